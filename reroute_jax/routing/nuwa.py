"""Nuwa's encoder-side stage: keep anchor patches, merge the neighbourhood into those with weak attention (4.3, 5.3).

Pure JAX, for one image on a grid that is an array, in arrays of a static size; batches by `jax.vmap`.
Source: arXiv 2602.02951 and its released LLaVA and Qwen code.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from reroute_jax.nn.precision import precision


class NuwaInputs(NamedTuple):
    """What Nüwa's stage 1 reads from the tower (arXiv 2602.02951)."""

    metric: Float[Array, "I n"]
    features: Float[Array, "I n D"]
    similarity: Float[Array, "I n K"]


def stage_one(
    metric: Float[Array, " n"],
    features: Float[Array, "n D"],
    similarity: Float[Array, "n C"],
    grid: Int[Array, 2],
    keep: Int[Array, ""],
    radius: Float[Array, ""],
    *,
    cap: int,
    top_n: int,
    quantile: Fraction,
    self_weight_override: bool,
) -> tuple[Float[Array, "cap D"], Int[Array, " cap"]]:
    """Merged features, in the features' dtype, and the patch index of each of the `keep` anchors, ascending; entries
    behind them hold index n.

    metric: attention each patch receives; features: what is merged; similarity: what patches are compared by, all for
    rows * cols patches in row-major order at the front of n slots. top_n: candidates per 2x2 region, whose number
    `keep` must not exceed; radius: reach in patches. Anchors at or above the `quantile` of the anchors' metric stay as
    they are. self_weight_override: an anchor counts with weight 1 on top of its normalised neighbourhood, as released
    for LLaVA; False leaves the weights summing to 1. Weights are fp32. Of equal metrics the lowest index wins.
    """
    n = metric.shape[0]
    inside = jnp.arange(n) < grid[0] * grid[1]
    metric = jnp.where(inside, metric.astype(jnp.float32), -jnp.inf)
    eligible = _candidates(metric, grid, top_n)
    _, best = jax.lax.top_k(jnp.where(eligible, metric, -jnp.inf), cap)
    anchors = jnp.sort(jnp.where(jnp.arange(cap) < keep, best, n))
    attention = metric.at[anchors].get(mode="fill", fill_value=jnp.inf)
    weights = jnp.where(inside, _weights(similarity.astype(jnp.float32), anchors, grid[1], radius), 0)
    own = jnp.arange(n) == anchors[:, None]
    weights = jnp.where((attention >= _quantile(attention, keep, quantile))[:, None] & ~own, 0, weights)
    weights = weights / (weights.sum(axis=1, keepdims=True) + 1e-8)
    if self_weight_override:
        weights = jnp.where(own, 1, weights)
    merged = jnp.matmul(weights.astype(features.dtype), features, precision=precision(features))
    return merged, anchors


def _candidates(metric: Float[Array, " n"], grid: Int[Array, 2], top_n: int) -> Bool[Array, " n"]:
    """The `top_n` best patches of each 2x2 region; at an odd edge a region is smaller."""
    index = jnp.arange(metric.shape[0])
    y, x = jnp.divmod(index, grid[1])
    better = jnp.zeros(index.shape, jnp.int32)
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        row, col = y - y % 2 + dy, x - x % 2 + dx
        other = row * grid[1] + col
        there = (row < grid[0]) & (col < grid[1])
        value = jnp.where(there, metric.at[other].get(mode="fill", fill_value=-jnp.inf), -jnp.inf)
        better += (value > metric) | ((value == metric) & (other < index))
    return (index < grid[0] * grid[1]) & (better < top_n)


def _weights(similarity: Float[Array, "n C"], anchors: Int[Array, " cap"], cols, radius) -> Float[Array, "cap n"]:
    """fp32: positive cosine similarity times a penalty that falls from 1 at the anchor to 0 at the radius."""
    norms = jnp.linalg.norm(similarity, axis=1, keepdims=True)
    unit = similarity / jnp.maximum(norms, 1e-12)
    of_anchors = unit.at[anchors].get(mode="fill", fill_value=0)
    cosine = jnp.matmul(of_anchors, unit.T, precision=precision(unit))
    y, x = jnp.divmod(jnp.arange(similarity.shape[0]), cols)
    anchor_y, anchor_x = jnp.divmod(anchors[:, None], cols)
    square = (anchor_y - y) ** 2 + (anchor_x - x) ** 2
    return jax.nn.relu(cosine) * (1 - jnp.minimum(jnp.sqrt(square.astype(jnp.float32)) / radius, 1))


def _quantile(values: Float[Array, " cap"], count: Int[Array, ""], q: Fraction) -> Float[Array, ""]:
    """Linear interpolation at index q * (count - 1) of the `count` smallest values, fp32 (10.9). The index is split in
    whole numbers: in fp32 a product that should be whole could come out above it, and its own value fail `>=`."""
    ordered = jnp.sort(values)
    place = q.numerator * (count - 1)
    low = place // q.denominator
    fraction = (place % q.denominator).astype(jnp.float32) / q.denominator
    high = jnp.minimum(low + 1, count - 1)
    return ordered[low] + fraction * (ordered[high] - ordered[low])
