"""Nuwa's encoder-side stage: keep anchor patches, merge the neighbourhood into those with weak attention (4.3).

Pure JAX, for one image; batches by `jax.vmap`. Source: arXiv 2602.02951 and its released LLaVA code.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from reroute_jax.errors import RerouteError
from reroute_jax.routing.plan import candidate_count

QUANTILE = 0.55


def stage_one(
    metric: Float[Array, " n"],
    features: Float[Array, "n D"],
    similarity: Float[Array, "n C"],
    *,
    grid: tuple[int, int],
    top_n: int,
    keep: int,
    radius: float,
    quantile: float = QUANTILE,
    self_weight_override: bool = True,
) -> tuple[Float[Array, "N1 D"], Int[Array, " N1"]]:
    """Merged features, in the features' dtype, and the patch index of each of the `keep` anchors, ascending.

    metric: attention each patch receives; features: what is merged; similarity: what patches are compared by, all for
    n = rows * cols patches in row-major order. top_n: candidates per 2x2 region; radius: reach in patches.
    Anchors at or above the `quantile` of the anchors' metric stay as they are. self_weight_override: an anchor counts
    with weight 1 on top of its normalised neighbourhood, as released; False leaves the row's weights summing to 1.
    Weights are fp32. Of equal metrics the lowest index wins. Raises RerouteError if the grid has too few candidates.
    """
    metric = metric.astype(jnp.float32)
    eligible = _candidates(metric, grid, top_n)
    anchors = _top(jnp.where(eligible, metric, -jnp.inf), keep, grid, top_n)
    weights = _weights(similarity.astype(jnp.float32), anchors, grid[1], radius)
    strong = metric[anchors] >= _quantile(metric[anchors], quantile)
    own = jnp.arange(metric.shape[0]) == anchors[:, None]
    weights = jnp.where(strong[:, None] & ~own, 0, weights)
    weights = weights / (weights.sum(axis=1, keepdims=True) + 1e-8)
    if self_weight_override:
        weights = jnp.where(own, 1, weights)
    merged = jnp.matmul(weights.astype(features.dtype), features, precision=jax.lax.Precision.HIGHEST)
    return merged, anchors


def _candidates(metric: Float[Array, " n"], grid: tuple[int, int], top_n: int) -> Bool[Array, " n"]:
    """The `top_n` best patches of each 2x2 region; the cells that pad an odd grid are never among them."""
    rows, cols = grid
    padded = jnp.pad(metric.reshape(grid), ((0, rows % 2), (0, cols % 2)), constant_values=-jnp.inf)
    height, width = padded.shape
    # [regions, 4], local order 2 * dy + dx
    regions = padded.reshape(height // 2, 2, width // 2, 2).transpose(0, 2, 1, 3).reshape(-1, 4)
    _, best = jax.lax.top_k(regions, top_n)
    chosen = (best[:, :, None] == jnp.arange(4)).any(axis=1)
    cells = chosen.reshape(height // 2, width // 2, 2, 2).transpose(0, 2, 1, 3).reshape(height, width)
    return cells[:rows, :cols].reshape(-1)


def _top(scores: Float[Array, " n"], keep: int, grid: tuple[int, int], top_n: int) -> Int[Array, " N1"]:
    limit = candidate_count(grid, top_n)
    if not 1 <= keep <= limit:
        raise RerouteError(f"cannot keep {keep} anchors of a grid with {limit} candidates, expected 1 to {limit}")
    return jnp.sort(jax.lax.top_k(scores, keep)[1])


def _weights(similarity: Float[Array, "n C"], anchors: Int[Array, " N1"], cols: int, radius: float):
    """fp32 [N1, n]: positive cosine similarity times a penalty that falls from 1 at the anchor to 0 at the radius."""
    norms = jnp.linalg.norm(similarity, axis=1, keepdims=True)
    unit = similarity / jnp.maximum(norms, 1e-12)
    cosine = jnp.matmul(unit[anchors], unit.T, precision=jax.lax.Precision.HIGHEST)
    y, x = jnp.divmod(jnp.arange(similarity.shape[0]), cols)
    square = (y[anchors, None] - y) ** 2 + (x[anchors, None] - x) ** 2
    return jax.nn.relu(cosine) * (1 - jnp.minimum(jnp.sqrt(square.astype(jnp.float32)) / radius, 1))


def _quantile(values: Float[Array, " N1"], q: float) -> Float[Array, ""]:
    """Linear interpolation at index q * (N1 - 1) of the sorted values, fp32 (10.9)."""
    ordered = jnp.sort(values)
    place = q * (values.shape[0] - 1)
    low = math.floor(place)
    high = min(low + 1, values.shape[0] - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
