"""Nuwa's encoder-side stage: keep anchor patches, merge the neighbourhood into those with weak attention (4.3, 5.3).

Pure JAX, for one image on a grid that is an array, in arrays of a static size; batches by `jax.vmap`.
Source: arXiv 2602.02951 and its released LLaVA and Qwen code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from reroute_jax.errors import RerouteError, one_of
from reroute_jax.nn.precision import precision
from reroute_jax.routing.kept import check_grid
from reroute_jax.routing.tower import Tower, TowerSizes
from reroute_jax.types import Grid

SIM_ORDERS = ("raster", "window")


@dataclass(frozen=True)
class NuwaMerge:
    """Nuwa's encoder-side stage (4.1 to 4.3, 4.7, 5.3): n patches become `anchors(n, grid)` tokens.

    share: of the tokens that stay, exact, because ceil(share * n) must not mis-round. top_n: candidates per 2x2 region.
    quantile: anchors whose metric is at or above it stay as they are. diagonal_radius: reach as on Qwen (5.3), else as
    on LLaVA (4.3). self_weight_override: an anchor counts with weight 1 on top of its normalised neighbourhood.
    sim_order: "window" compares patches as Qwen's release does, in the order of its attention windows (5.2).
    """

    share: Fraction
    top_n: int
    quantile: Fraction = Fraction(11, 20)
    diagonal_radius: bool = False
    self_weight_override: bool = True
    sim_order: str = "raster"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise RerouteError(f"a Nuwa merge keeps a share of {self.share}, expected a fraction in (0, 1]")
        if self.top_n not in (1, 2, 3, 4):
            raise RerouteError(f"top_n is {self.top_n}, expected 1 to 4 candidates of a 2x2 region")
        one_of("sim_order", self.sim_order, SIM_ORDERS)

    def anchors(self, visual: int, grid: tuple[int, int]) -> int:
        """N1, the tokens left of `visual` patches on a (rows, cols) grid."""
        check_grid(visual, grid)
        return min(self.cap(visual), candidate_count(grid, self.top_n))

    def cap(self, visual: int) -> int:
        """The most that can be left of up to `visual` patches."""
        return math.ceil(self.share * visual)

    def radius(self, grid: tuple[int, int]) -> float:
        """Reach of a merge in patches: sqrt(280) for LLaVA's side of 24, 0.8 of the diagonal of Qwen's padded grid."""
        if not self.diagonal_radius:
            return math.sqrt(280) * max(grid) / 24
        rows, cols = (side + side % 2 for side in grid)
        return 0.8 * math.hypot(rows - 1, cols - 1)

    def arrays(self, grid: Grid, tokens: int) -> dict[str, np.ndarray]:
        keep, radius = self.anchors(grid[0] * grid[1], grid), self.radius(grid)
        return {
            "grid": np.array(grid, np.int32),
            "keep": np.array(keep, np.int32),
            "radius": np.array(radius, np.float32),
        }

    def reduce(self, tower: Tower, arrays: dict[str, Array]) -> tuple[Float[Array, "I C E"], Int[Array, "I C"]]:
        features, similarity = tower.features(), tower.similarity(self.sim_order)
        one = partial(stage_one, **self._rules(features.shape[1]))
        given = (arrays[name] for name in ("grid", "keep", "radius"))
        merged, anchors = jax.vmap(one)(tower.metric(), features, similarity, *given)
        return tower.project(merged), anchors

    def members(self, tower: Tower, arrays: dict[str, Array]) -> Bool[Array, "I C n"]:
        """All tokens that take part in an anchor's sum."""
        metric, given = tower.metric(), (arrays[name] for name in ("grid", "keep", "radius"))
        one = partial(merge_weights, **self._rules(metric.shape[1]))
        weights, _ = jax.vmap(one)(metric, tower.similarity(self.sim_order), *given)
        return weights > 0

    def macs(self, sizes: TowerSizes, grid: Grid) -> int:
        """Of the metric, what tokens are compared by, the cosines of the anchors and their sums."""
        visual = grid[0] * grid[1]
        sums = self.anchors(visual, grid) * visual * (sizes.similarity + sizes.features)
        return sizes.metric_macs(visual) + visual * sizes.merger + sums

    def _rules(self, tokens: int) -> dict[str, Any]:
        names = ("top_n", "quantile", "self_weight_override")
        return {"cap": self.cap(tokens), **{name: getattr(self, name) for name in names}}


def candidate_count(grid: tuple[int, int], top_n: int) -> int:
    """Patches of a (rows, cols) grid that are among the `top_n` of their 2x2 region, smaller at an odd edge."""
    heights, widths = ([min(2, side - start) for start in range(0, side, 2)] for side in grid)
    return sum(min(top_n, height * width) for height in heights for width in widths)


def stage_one(
    metric: Float[Array, " n"],
    features: Float[Array, "n D"],
    similarity: Float[Array, "n C"],
    grid: Int[Array, 2],
    keep: Int[Array, ""],
    radius: Float[Array, ""],
    **rules: Any,
) -> tuple[Float[Array, "cap D"], Int[Array, " cap"]]:
    """Merged features, in the features' dtype, and the patch index of each of the `keep` anchors, ascending; entries
    behind them hold index n. features: what is merged, of patches as in `merge_weights`, which explains the rest."""
    weights, anchors = merge_weights(metric, similarity, grid, keep, radius, **rules)
    return jnp.matmul(weights.astype(features.dtype), features, precision=precision(features)), anchors


def merge_weights(
    metric: Float[Array, " n"],
    similarity: Float[Array, "n C"],
    grid: Int[Array, 2],
    keep: Int[Array, ""],
    radius: Float[Array, ""],
    *,
    cap: int,
    top_n: int,
    quantile: Fraction,
    self_weight_override: bool,
) -> tuple[Float[Array, "cap n"], Int[Array, " cap"]]:
    """fp32 weights of all patches for each of the `keep` anchors, and these, ascending, n behind them.

    metric: attention each patch receives; similarity: what patches are compared by, both for rows * cols patches in
    row-major order at the front of n slots. top_n: candidates per 2x2 region, whose number `keep` must not exceed;
    radius: reach in patches. Anchors at or above the `quantile` of the anchors' metric stay as they are.
    self_weight_override: an anchor counts with weight 1 on top of its normalised neighbourhood, as released for LLaVA;
    False leaves the weights summing to 1. Of equal metrics the lowest index wins.
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
    return weights, anchors


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
