"""Ahead-of-time accounts, with this machine's own CPU for the chip that is elsewhere."""

import json

import jax
import jaxtyping
import pytest

from benchmarks import aot
from evals.speed.subjects import random_model
from reroute_jax.errors import RerouteError

ARGUMENTS = ["--random", "llava-tiny-gqa", "--dtype", "float32", "--text", "16", "--batch-sizes", "2"]


@pytest.fixture(autouse=True)
def unchecked_annotations():
    """Lowering ahead of time puts shapes where the annotations of `Prompt` want arrays."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(aot, "topology", lambda platform, name: jax.devices("cpu"))


def test_a_run_goes_on_where_it_stopped(here, monkeypatch, tmp_path, capsys):
    some = [
        *ARGUMENTS,
        "--methods",
        "none",
        "pdrop",
        "--budgets",
        "192",
        "--actions",
        "reroute",
        "--out",
        str(tmp_path),
    ]
    assert aot.main([*some, "--programs", "prefill"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "aot_tpu.jsonl").read_text().splitlines()]
    assert [(row["method"], row["program"], row["batch"]) for row in rows] == [
        ("none", "prefill", 2),
        ("pdrop", "prefill", 2),
    ]
    plain, routed = rows
    weights = 4 * sum(leaf.size for leaf in jax.tree.leaves(_decoder()))
    assert plain["argument_bytes"] > weights and routed["argument_bytes"] > weights
    assert 0 < routed["flops"] < plain["flops"] and routed["operations"] > plain["operations"]
    assert plain["sorts"] == plain["scatters"] == 0
    capsys.readouterr()

    seen, account = [], aot.account
    monkeypatch.setattr(aot, "account", lambda *given: seen.append(given) or account(*given))
    assert aot.main([*some, "--programs", "prefill", "decode"]) == 0
    assert len(seen) == 2
    rows = [json.loads(line) for line in (tmp_path / "aot_tpu.jsonl").read_text().splitlines()]
    assert [row["program"] for row in rows] == ["prefill", "prefill", "decode", "decode"]
    text = (tmp_path / "aot_tpu.md").read_text()
    assert text in capsys.readouterr().out and "| llava-tiny-gqa |  | 2 | pdrop reroute 192 | decode |" in text
    assert text.startswith("`python -m benchmarks.aot --random llava-tiny-gqa")


def test_towers_are_compiled_once_for_each_merge():
    args = aot._parser().parse_args([*ARGUMENTS, "--programs", "encode"])
    assert [(one.method, one.budget) for one in aot.wanted(args, "a chip")] == [
        ("none", None),
        ("nuwa", 192),
        ("nuwa", 64),
    ]


def test_an_unknown_topology_is_one_line(capsys, tmp_path):
    assert aot.main([*ARGUMENTS, "--platform", "cpu", "--topology", "v9:2x2", "--out", str(tmp_path)]) == 2
    assert "no compiler for the topology 'v9:2x2' of 'cpu' here" in capsys.readouterr().err


def test_a_program_that_a_chip_does_not_hold_is_a_row_and_any_other_failure_ends_the_run(monkeypatch):
    said = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (15.77G) exceeds "
        "available HBM (15.75G)."
    )
    traced = jax.jit(lambda x: x + 1).trace(1.0)

    def account(problem: str) -> aot.ProgramCost:
        def fail(self):
            raise jax.errors.JaxRuntimeError(problem)

        monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
        return aot.account(traced, jax.devices("cpu")[0], 0.0)

    found = account(said)
    assert (found.needs, found.flops) == ("15.77G of 15.75G", None) and found.operations > 0
    one = aot.Wanted("llava-1.5-7b", "bfloat16", "a chip", "0", 64, 8, "none", None, None, "prefill", None)
    (row,) = aot.table({one: found}).splitlines()[2:]
    assert "| 8 | none | prefill |" in row and "| does not fit: 15.77G of 15.75G |" in row
    with pytest.raises(RerouteError, match="the compiler fails: INTERNAL: a pass"):
        account("INTERNAL: a pass")


def _decoder():
    return random_model(aot.SHAPES["llava-tiny-gqa"], "float32", shapes_only=True)[0].module.decoder
