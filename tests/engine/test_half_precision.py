"""Half precision against the fp32 run of the same weights: logits within the type's own rounding, and what is selected.

The weights are bf16 numbers, which fp32 and (but for a few near its smallest) fp16 hold exactly, so that only the
arithmetic differs.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import reroute_jax
from reroute_jax.engine.model import Model, PrefillResult
from tests import tiny, tiny_qwen
from tests.marks import cases
from tests.ragged import padded

LAYERS = 3
LENGTHS = (300, 260, 200, 140, 100, 80)
GRID = (6, 6)
FAMILIES = ("llava", "qwen2_5_vl")
ROUTES = {
    "pdrop-reroute": {"method": "pdrop", "action": "reroute"},
    "pdrop-delete": {"method": "pdrop", "action": "delete"},
    "nuwa-reroute": {"method": "nuwa", "action": "reroute"},
}


@cache
def folder(family: str) -> Path:
    write = {"llava": tiny.tiny_llava, "qwen2_5_vl": tiny_qwen.tiny_qwen}[family]
    return write(Path(mkdtemp()) / family, kv_heads=2, layers=LAYERS, vision_layers=3, dtype=torch.bfloat16)


@cache
def load(family: str, dtype: str) -> Model:
    return reroute_jax.load(folder(family), dtype)


@cache
def inputs(family: str) -> dict[str, np.ndarray]:
    """A batch of prompts with one image each, from short ones to one on which an angle in half precision shows."""
    if family == "llava":
        rows = [tiny.random_ids(length, start=4, seed=length) for length in LENGTHS]
        images = {"pixel_values": tiny.random_pixels(len(rows))}
    else:
        rows = [tiny_qwen.random_ids(length, [GRID], start=4, seed=length) for length in LENGTHS]
        pixels, thw = tiny_qwen.random_patches([GRID] * len(rows))
        images = {"pixel_values": pixels, "image_grid_thw": thw}
    ids, mask = padded(rows, left=False)
    return {"input_ids": ids, "attention_mask": mask, **images}


@cache
def run(family: str, dtype: str, route: str | None) -> PrefillResult:
    model = load(family, dtype)
    schedule = None if route is None else model.plan(budget=0.5, **ROUTES[route])
    return model.prefill(**inputs(family), schedule=schedule, trace=True)


def errors(half: PrefillResult, exact: PrefillResult) -> np.ndarray:
    """`[B]`: RMS difference of a row's logits, relative to their RMS."""
    difference = np.mean((half.logits - exact.logits) ** 2, axis=1)
    return np.sqrt(difference / np.mean(exact.logits**2, axis=1))


def bound(dtype: str) -> float:
    """Relative RMS error of logits that rounding alone explains.

    A value rounded to a mantissa of p bits errs by at most u = 2^-p of itself, u / sqrt(3) in RMS. A layer rounds about
    19 tensors on the way to its output (norms, products, rotations, probabilities, gate, sums); such errors are
    independent, so they add as squares: sqrt(19 / 3) = 2.5 u a layer, and sqrt(L) times that in L. Peaked attention
    (logits of deviation 3) turns an error of its logits into 3 times that of its weights, which makes 8 u sqrt(L).
    Measured: up to 5.4 without routing and 6.5 with, as often in bf16 as in fp16 (jax 0.10.2, November 2026).
    """
    unit = float(jnp.finfo(dtype).eps) / 2
    return 8 * unit * LAYERS**0.5


def chosen(result: PrefillResult, row: int) -> list[list[int]]:
    """What stage 1 and each decision kept of a row, by original visual index."""
    trace = result.trace
    kept = [*trace.selected] if trace.anchors is None else [trace.anchors, *trace.selected]
    return [one[row][one[row] >= 0].tolist() for one in kept]


@pytest.mark.parametrize("dtype", cases(["bfloat16", "float16"], {"float16"}))
@pytest.mark.parametrize("family", cases(FAMILIES, {"qwen2_5_vl"}))
def test_logits_differ_by_rounding(family, dtype):
    assert {leaf.dtype.name for leaf in jax.tree.leaves(load(family, dtype).module)} == {dtype}
    found = errors(run(family, dtype, None), run(family, "float32", None))
    # An error of nothing would mean that both ran in the same type.
    assert bound(dtype) / 20 < found.min() and found.max() < bound(dtype), found / bound(dtype)


@pytest.mark.parametrize("route", cases(ROUTES, {"pdrop-delete", "nuwa-reroute"}))
@pytest.mark.parametrize("family", cases(FAMILIES, {"qwen2_5_vl"}))
def test_routed_bf16_selects_alike_and_differs_by_rounding_where_it_selects_the_same(family, route):
    """Scores within rounding of the cut may change places, one or two of a selection. From there on the rows run other
    tokens, so that logits are compared where all selections are equal.

    The floor: measured 0.90 to 1 of a selection, mean over the batch; a random choice shares a fifth to a half.
    """
    half, exact = run(family, "bfloat16", route), run(family, "float32", route)
    rows = [(chosen(half, row), chosen(exact, row)) for row in range(len(LENGTHS))]
    for number in range(len(rows[0][0])):
        pairs = [(set(ours[number]), set(wanted[number])) for ours, wanted in rows]
        shares = [len(ours & wanted) / len(wanted) for ours, wanted in pairs]
        assert np.mean(shares) >= 0.85, (number, shares)
    same = np.array([ours == wanted for ours, wanted in rows])
    assert same.any()
    found = errors(half, exact)
    assert found[same].max() < bound("bfloat16"), (same, found / bound("bfloat16"))
