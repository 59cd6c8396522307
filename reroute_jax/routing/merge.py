"""Fewer visual tokens before the decoder: what the host prepares for each image, and the device's two merges.

Letters: I images, n tokens of the largest one (a bucket), C tokens left at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from reroute_jax.routing.nuwa import stage_one
from reroute_jax.routing.plan import NuwaMerge, PoolMerge
from reroute_jax.routing.pool import pool_weights
from reroute_jax.types import AnyArray, Grid


@jax.tree_util.register_dataclass
@dataclass
class MergeArrays:
    """grid: (rows, columns) of an image's tokens. keep: tokens left of it. radius: reach of a merge, in tokens.
    pool, centre: weights of the pooled cells and their centre tokens; no cells unless images are pooled."""

    grid: Int[AnyArray, "I 2"]
    keep: Int[AnyArray, " I"]
    radius: Float[AnyArray, " I"]
    pool: Float[AnyArray, "I cells n"]
    centre: Int[AnyArray, "I cells"]


def merge_arrays(merge: NuwaMerge | PoolMerge | None, grids: Sequence[Grid], images: int, tokens: int) -> MergeArrays:
    """Arrays for `images` images of up to `tokens` tokens, those behind `grids` being padding of one token."""
    filled = [*grids, *[(1, 1)] * (images - len(grids))]
    cells = merge.cap(tokens) if isinstance(merge, PoolMerge) else 0
    pool, centre = np.zeros((images, cells, tokens), np.float32), np.zeros((images, cells), np.int32)
    keep, radius = np.ones(images, np.int32), np.ones(images, np.float32)
    for i, grid in enumerate(grids):
        size = grid[0] * grid[1]
        if merge is not None:
            keep[i] = merge.anchors(size, grid)
        if isinstance(merge, NuwaMerge):
            radius[i] = merge.radius(grid)
        if isinstance(merge, PoolMerge):
            weights, centres = pool_weights(grid, merge.cells(size, grid))
            pool[i, : len(weights), :size], centre[i, : len(weights)] = weights, centres
    return MergeArrays(np.array(filled, np.int32), keep, radius, pool, centre)


def nuwa(
    merge: NuwaMerge,
    arrays: MergeArrays,
    features: Float[Array, "I n D"],
    metric: Float[Array, "I n"],
    similarity: Float[Array, "I n K"],
) -> tuple[Float[Array, "I C D"], Int[Array, "I C"]]:
    """Merged features and the index of the token each stands for."""
    one = partial(
        stage_one,
        cap=merge.cap(features.shape[1]),
        top_n=merge.top_n,
        quantile=merge.quantile,
        self_weight_override=merge.self_weight_override,
    )
    return jax.vmap(one)(metric, features, similarity, arrays.grid, arrays.keep, arrays.radius)


def pooled(
    merge: PoolMerge | None, arrays: MergeArrays, features: Float[Array, "I n D"]
) -> tuple[Float[Array, "I C D"], Int[Array, "I C"]]:
    """Averages (fp32 sums) and the centre token of each cell; without a merge the features as they are."""
    if merge is None:
        return features, jnp.broadcast_to(jnp.arange(features.shape[1]), features.shape[:2])
    # The fp32 weights make the whole product fp32.
    averages = jnp.einsum("Icn,InD->IcD", arrays.pool, features, precision=jax.lax.Precision.HIGHEST)
    return averages.astype(features.dtype), jnp.asarray(arrays.centre)
