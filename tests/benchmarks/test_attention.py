"""Attention by several hands: all that can run here agree, and the loop of decode steps is what it says."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import attention
from benchmarks.attention import AttentionShape, Backbone
from reroute_jax.errors import RerouteError

# More slots than one block of queries.
TINY = AttentionShape((Backbone("tiny", "llava", 4, 4, 2, 8),), (16, 16), 16, (), 2, cached=5, steps=2, cache_bytes=1)


def test_every_variant_sees_the_same_or_says_what_it_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(attention.SHAPES, "rehearsal", TINY)
    arguments = ["--shape", "rehearsal", "--dtype", "float32", "--batch-sizes", "2", "--repetitions", "1"]
    assert attention.main([*arguments, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "attention.json").read_text())
    rows = {(row["kind"], row["variant"]): row for row in result["rows"]}
    refused = rows.pop(("prefill", attention.CUDNN))
    assert refused["note"] == "needs a GPU" and "us_a_layer" not in refused
    able = [("prefill", attention.OURS), ("prefill", attention.XLA)]
    assert list(rows) == [*able, ("decode", attention.HEADS_FIRST), ("decode", attention.SLOTS_FIRST)]
    for row in rows.values():
        assert row["difference"] < 1e-5 and row["us_a_layer"] > 0 and row["note"] == ""
    assert rows["prefill", attention.XLA]["slots"] == 272 and rows["decode", attention.SLOTS_FIRST]["slots"] == 5
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out and len(text.splitlines()) == 2 + len(result["rows"])
    assert result["command"].startswith("python -m benchmarks.attention --shape rehearsal")


@pytest.mark.parametrize("axis", [1, 2])
def test_decode_step_by_step(axis):
    """Two steps on one layer with three cached slots, in numpy: each sees the cache and all tokens up to its own."""
    new, cache = attention.normal((((2, 1, 4, 8), (2, 1, 2, 8), (2, 1, 2, 8)), ((1, 2, 5, 8), (1, 2, 5, 8))), "float32")
    queries, keys, values = (np.asarray(x)[:, 0] for x in new)
    held = [np.asarray(x)[0, :, :3] for x in cache]
    expected = []
    for step in range(2):
        held = [np.concatenate([old, of[step][:, None]], axis=1) for old, of in zip(held, (keys, values), strict=True)]
        k, v = (np.repeat(x, 2, axis=0) for x in held)
        weights = np.exp(np.einsum("NH,NSH->NS", queries[step], k) * 8**-0.5)
        expected.append(np.einsum("NS,NSH->NH", weights / weights.sum(axis=1, keepdims=True), v))
    laid = [[x if axis == 2 else x.swapaxes(1, 2) for x in cache]]
    call = attention.decoding(new, jax.tree.map(jnp.copy, laid), 3, axis)
    for _ in range(2):  # the second run finds what the first left behind it, and writes it again
        np.testing.assert_allclose(np.asarray(call())[:, 0, :, 0], expected, atol=2e-6)  # fp32: sums in other orders


def test_prompts_are_those_of_the_unrouted_model_and_of_the_papers_budgets():
    """By hand, LLaVA: three of 32 layers run all 576, so that 29 must average (32 B - 3 x 576) / 29."""
    llava = attention.SHAPES["7b"].backbones[0]
    full, *routed = attention.prompt_slots(llava, attention.SHAPES["7b"])
    assert full == 640
    plans = [
        attention.plan("fastv", budget=tier, num_layers=32, visual=576, grid=(24, 24), family="llava")
        for tier in (192, 128, 64)
    ]
    first = plans[0].decisions[0].lo
    assert routed == [64 + int((32 * tier - first * 576) / (32 - first)) for tier in (192, 128, 64)]


def test_a_variant_that_is_off_stops_the_command():
    row = {"kind": "prefill", "model": "m", "batch": 1, "slots": 4, "variant": "v", "difference_of_largest": 0.01}
    attention.check([row], "bfloat16")
    with pytest.raises(RerouteError, match=r"v \(prefill, m, batch 1, 4 slots\) is off by 1.0e-02 of the largest"):
        attention.check([row], "float32")
