"""The cross-check as a user runs it: agreement, a difference it must notice, and bad input."""

import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert.crosscheck.command as crosscheck
from convert.crosscheck.command import main
from convert.crosscheck.comparison import Line, difference, merge, table, unequal
from reroute_jax.nn.positions import rope_tables
from tests.tiny import tiny_llava
from tests.tiny_qwen import tiny_qwen

FAST = ["--prompts", "1", "--max-new-tokens", "3"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("tiny"), kv_heads=2, layers=4, vision_layers=3)


def test_frameworks_agree_without_and_with_routing(checkpoint, capsys):
    assert main([str(checkpoint), *FAST, "--method", "nuwa", "--budget", "2/9"]) == 0
    out = capsys.readouterr().out
    for quantity in (
        "image features",
        "layer 0 on the same input",
        "layer 2 on the same input",
        "logits, all positions",
    ):
        assert f"\n{quantity} " in out
    routed = "nuwa reroute 0.2222: "
    for quantity in (
        "anchors",
        "members",
        "layer 2: selected",
        "layer 3: scores",
        "keys cached per layer",
        "greedy tokens",
    ):
        assert f"\n{routed}{quantity} " in out
    assert "0 of 2 " in out and "DIFFERENT" not in out and out.endswith("PyTorch and JAX agree\n")


@pytest.mark.slow
def test_frameworks_agree_on_qwen(tmp_path, capsys):
    """Positions of three channels, merged dynamic grids, the score of three queries, the repetition penalty."""
    folder = tiny_qwen(tmp_path, layers=4, vision_layers=3)
    assert main([str(folder), *FAST, "--method", "nuwa", "--action", "delete", "--keep-ratio", "0.5"]) == 0
    out = capsys.readouterr().out
    routed = "nuwa delete keep_ratio=0.5: "
    for quantity in ("image features", "logits, all positions", "greedy tokens"):
        assert f"\n{quantity} " in out
    for quantity in (
        "merged image features",
        "anchors",
        "members",
        "layer 2: selected",
        "layer 2: scores",
        "greedy tokens",
    ):
        assert f"\n{routed}{quantity} " in out
    assert "DIFFERENT" not in out and out.endswith("PyTorch and JAX agree\n")


def test_a_wrong_weight_is_noticed_where_it_is(checkpoint, tmp_path, capsys, monkeypatch):
    """JAX gets a checkpoint with one changed tensor: only what depends on it may differ."""
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in checkpoint.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    tensors = load_file(damaged / "model.safetensors")
    name = "language_model.model.layers.1.self_attn.k_proj.weight"
    tensors[name] = tensors[name] * np.float32(1.01)
    save_file(tensors, damaged / "model.safetensors")
    load = crosscheck.reroute_jax.load
    monkeypatch.setattr(crosscheck.reroute_jax, "load", lambda src, dtype, mesh: load(damaged, dtype))
    assert main([str(checkpoint), *FAST]) == 1
    rows = dict(
        line.rsplit("  ", 1) for line in capsys.readouterr().out.splitlines() if line.endswith(("ok", "DIFFERENT"))
    )
    verdict = {quantity.split("  ")[0]: result for quantity, result in rows.items()}
    assert verdict["layer 1 on the same input"] == verdict["logits, last position"] == "DIFFERENT"
    assert (
        verdict["image features"]
        == verdict["layer 0 on the same input"]
        == verdict["layer 2 on the same input"]
        == "ok"
    )


def test_a_wrong_selection_is_noticed(checkpoint, capsys, monkeypatch):
    """The reference decides with another rule than the plan's: selections, not the plain model, differ."""
    monkeypatch.setattr("convert.crosscheck.reference.select", lambda scores, count: (-scores).argsort()[1 : count + 1])
    assert main([str(checkpoint), *FAST, "--method", "fastv", "--budget", "1/2", "--action", "delete"]) == 1
    out = capsys.readouterr().out
    different = [line.split("  ")[0] for line in out.splitlines() if line.endswith("DIFFERENT")]
    assert "fastv delete 0.5: layer 1: selected" in different
    assert all(quantity.startswith("fastv delete 0.5: ") for quantity in different)


@pytest.fixture(scope="module")
def massive(tmp_path_factory):
    """A few channels in the thousands from layer 0 on and norms that make up for them, as in trained decoders."""
    folder = tiny_llava(tmp_path_factory.mktemp("massive"), kv_heads=2, layers=4, vision_layers=3, hidden=256)
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.model.layers.0.mlp.down_proj.weight"][[5, 77]] *= 500
    for name, value in tensors.items():
        if "language_model" in name and "norm" in name and "layers.0.input" not in name and "layers.0.post" not in name:
            value *= 400
            value[[5, 77]] *= 1e-4
    save_file(tensors, folder / "model.safetensors")
    return folder


def rows_of(out):
    """quantity -> (difference, scale, allowed, verdict) of the lines that compare numbers."""
    found = {}
    for line in out.splitlines():
        if line.endswith((" ok", " DIFFERENT")) and " of " not in line:
            quantity, *numbers, verdict = re.split(r" {2,}", line)
            found[quantity] = (*map(float, numbers), verdict)
    return found


@pytest.mark.slow
def test_activations_in_the_thousands_agree(massive, capsys):
    assert main([str(massive), *FAST]) == 0
    rows = rows_of(capsys.readouterr().out)
    difference, scale, allowed, _ = rows["layer 2 on the same input"]
    assert scale > 1000 and allowed == pytest.approx(1e-5 * scale, rel=0.5)
    assert 1e-5 < difference < allowed  # more than an absolute bound, or one of ordinary rows, would let pass


@pytest.mark.slow
def test_a_broken_layer_shows_among_activations_in_the_thousands(massive, capsys, monkeypatch):
    """Tokens from the tenth on turn by one position too many."""
    monkeypatch.setattr(
        "convert.crosscheck.comparison.rope_tables",
        lambda positions, config: rope_tables(positions + (jnp.arange(positions.shape[-1]) >= 10), config),
    )
    assert main([str(massive), *FAST]) == 1
    rows = rows_of(capsys.readouterr().out)
    assert rows["image features"][-1] == "ok"
    assert {rows[f"layer {number} on the same input"][-1] for number in range(3)} == {"DIFFERENT"}


def test_lines_of_several_prompts_become_one():
    real = [Line("logits", 1e-6, 1e-4), Line("tokens", 0, of=32), Line("logits", 3e-6, 1e-4), Line("tokens", 2, of=32)]
    assert merge(real) == [Line("logits", 3e-6, 1e-4), Line("tokens", 2, of=64)]
    assert [line.passes for line in merge(real)] == [True, False]
    assert table([Line("x", 2e-6, 1e-5, scale=3000)]).split()[3:] == ["x", "6.0e-03", "3000", "3e-02", "ok"]
    assert table(merge(real)).splitlines()[2].split() == ["tokens", "2", "of", "64", "0", "DIFFERENT"]


def test_differences_are_relative_to_rows_of_large_numbers():
    expected = np.array([[3.0, -3.0], [300.0, -300.0], [0.0, 0.5]])
    for row, found in enumerate((2e-6, 2e-4, 1e-6)):
        wrong = expected.copy()
        wrong[row, 1] += found
        line = difference("x", wrong, expected, 1e-5)
        assert line.found == pytest.approx((2e-6 / 3, 2e-4 / 300, 1e-6)[row], rel=1e-3) and line.passes
    assert not difference("x", expected + 1e-4, expected, 1e-5).passes


def test_unequal_selections_are_counted():
    assert unequal("x", np.array([1, 4, 9, -1]), np.array([1, 4, 9])).found == 0
    assert unequal("x", np.array([1, 5, -1, -1]), np.array([1, 4, 9])) == Line("x", 2, of=3)
    assert not unequal("x", np.array([1, 4, 9, 10]), np.array([1, 4, 9])).passes


def test_not_a_number_never_passes():
    lines = [Line("logits", float("nan"), 1e-4), Line("logits", 0, 1e-4)]
    assert not merge(lines)[0].passes and not merge(lines[::-1])[0].passes


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--budget", "64"], "--budget belongs to a --method"),
        (["--preset", "llava15_fastv_K3_avg64"], "for 32 decoder layers and the model has 4"),
        (["--preset", "llava15_fastv_K3_avg64", "--method", "fastv"], "--preset fixes the whole schedule"),
        (["--schedule", "none.json"], "none.json is not a schedule file"),
        (["--schedule", "none.json", "--budget", "64"], "--schedule fixes the whole schedule, leave out --budget"),
        (["--method", "fastv", "--budget", "0.01"], "leaves fewer than one"),
    ],
)
def test_bad_arguments_give_one_line(checkpoint, capsys, arguments, said):
    assert main([str(checkpoint), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_a_checkpoint_without_tokenizer_gives_one_line(checkpoint, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "tokenizer and an image processor" in error and error.count("\n") == 1


def test_a_converted_checkpoint_is_refused(checkpoint, tmp_path, capsys):
    out = tmp_path / "converted"
    from convert.__main__ import main as convert

    assert convert([str(checkpoint), str(out)]) == 0
    capsys.readouterr()
    assert main([str(out)]) == 2
    assert "give the Hugging Face one" in capsys.readouterr().err


def test_without_torch_one_line_names_the_extra():
    code = (
        "import sys; sys.modules['torch'] = None; from convert.crosscheck import command; sys.exit(command.main(['x']))"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.returncode == 2
    assert (
        result.stderr.splitlines()[-1].startswith("error: a cross-check needs PyTorch") and "[torch]" in result.stderr
    )
