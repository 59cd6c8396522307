"""What a later question about an image costs."""

import json

import jaxtyping
import pytest

from benchmarks import second_question


@pytest.fixture(autouse=True)
def unchecked_annotations():
    """Lowering ahead of time puts shapes where the annotations of `Prompt` want arrays."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_flops_of_a_shape(tmp_path, capsys):
    """Four layers, 16 visual and 16 text tokens. Unrouted, a later question runs its own 16 slots of 32, and no tower;
    what is shared before a decision at layer 1 is a quarter of that."""
    out = tmp_path / "second.jsonl"
    plans = ["none", "fastv:0.5:delete@1"]
    arguments = ["--random", "llava-tiny-gqa", "--text", "16", "--plans", *plans, "--out", str(out)]
    assert second_question.main(arguments) == 0
    whole, routed = map(json.loads, out.read_text().splitlines())
    assert (whole["shared_layers"], routed["shared_layers"]) == (4, 1)
    for one in (whole, routed):
        assert one["tower_tflops"] < one["fresh_tflops"] and one["later_tflops"] < one["first_tflops"]
    assert 1 < routed["speed_up"] < 2 < whole["speed_up"]
    # Keys and values of four layers, two heads of 8 each, in fp32; or of one, and hidden states of width 32.
    slots = 16 + 16
    assert whole["image_bytes"] == slots * 4 * (2 * 4 * 2 * 8) and routed["image_bytes"] == slots * 4 * (2 * 2 * 8 + 32)
    shown = capsys.readouterr().out
    assert "| llava-tiny-gqa | fastv:0.5:delete@1 | 1 |" in shown


def test_a_plan_that_is_none(capsys):
    with pytest.raises(SystemExit):
        second_question.main(["--plans", "pdrop@x"])
    assert "argument --plans: 'x' is no whole number from 0 on" in capsys.readouterr().err
