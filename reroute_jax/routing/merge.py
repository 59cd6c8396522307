"""Fewer visual tokens before the decoder: all ways by name, and what the host prepares of each image for them.

Letters: I images, C tokens left of one at most, E decoder width.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from reroute_jax.routing.divprune import DivPrune
from reroute_jax.routing.downsample import Downsample
from reroute_jax.routing.hiprune import HiPrune
from reroute_jax.routing.nuwa import NuwaMerge
from reroute_jax.routing.pool import PoolMerge
from reroute_jax.routing.tower import Tower
from reroute_jax.routing.visionzip import VisionZip
from reroute_jax.types import AnyArray, Grid

# Each has `anchors(visual, grid)` and `cap(visual)`, the tokens that it leaves; `arrays(grid, tokens)`, of one image of
# up to `tokens` tokens; `reduce(tower, arrays)`, features at decoder width and the token that each stands for;
# `members(tower, arrays)`, the tokens that each is made of; and `macs(sizes, grid)`, its multiply-accumulates (20).
Merge = NuwaMerge | PoolMerge | Downsample | DivPrune | HiPrune | VisionZip
MERGES = {merge.__name__: merge for merge in (NuwaMerge, PoolMerge, Downsample, DivPrune, HiPrune, VisionZip)}


def merge_arrays(merge: Merge | None, grids: Sequence[Grid], images: int, tokens: int) -> dict[str, np.ndarray]:
    """What `reduced` needs for `images` images of up to `tokens` tokens; those behind `grids` are padding, which
    repeats the first."""
    if merge is None:
        return {}
    made = [merge.arrays(grid, tokens) for grid in grids]
    filled = [*made, *made[:1] * (images - len(made))]
    return {name: np.stack([one[name] for one in filled]) for name in made[0]}


def reduced(
    merge: Merge | None, tower: Tower, arrays: dict[str, AnyArray]
) -> tuple[Float[Array, "I C E"], Int[Array, "I C"]]:
    """Features at decoder width and the index of the token that each stands for; all of them without a merge."""
    if merge is None:
        features = tower.project(tower.features())
        return features, jnp.broadcast_to(jnp.arange(features.shape[1]), features.shape[:2])
    return merge.reduce(tower, jax.tree.map(jnp.asarray, arrays))
