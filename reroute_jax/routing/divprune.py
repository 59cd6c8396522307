"""DivPrune (CVPR 2025): keep the tokens that are farthest from each other (16.1)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from reroute_jax.nn.layers import take_rows
from reroute_jax.routing.kept import Kept
from reroute_jax.routing.tower import Tower, TowerSizes
from reroute_jax.types import Grid


@dataclass(frozen=True)
class DivPrune(Kept):
    """By the cosine distance of features at decoder width; neither text nor attention plays a part."""

    def arrays(self, grid: Grid, tokens: int) -> dict[str, np.ndarray]:
        size = grid[0] * grid[1]
        return {"size": np.array(size, np.int32), "keep": np.array(self.anchors(size, grid), np.int32)}

    def reduce(self, tower: Tower, arrays: dict[str, Array]) -> tuple[Float[Array, "I C E"], Int[Array, "I C"]]:
        features = tower.project(tower.features())
        one = partial(farthest, cap=self.cap(features.shape[1]))
        index = jax.vmap(one)(features, arrays["size"], arrays["keep"])
        return take_rows(features, index), index

    def macs(self, sizes: TowerSizes, grid: Grid) -> int:
        """Of the distances (20)."""
        return (grid[0] * grid[1]) ** 2 * sizes.projected


def farthest(
    features: Float[Array, "n E"], size: Int[Array, ""], keep: Int[Array, ""], *, cap: int
) -> Int[Array, " cap"]:
    """Indices, ascending, of `keep` of the first `size` tokens; n behind them.

    First the token farthest from its nearest neighbour, then always the one farthest from all that were chosen; of
    equal ones the lowest. A chosen token is not chosen again, as it is in the release where another equals it.
    """
    n = features.shape[0]
    wide = features.astype(jnp.float32)
    unit = wide / jnp.maximum(jnp.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
    distance = 1 - jnp.matmul(unit, unit.T, precision=jax.lax.Precision.HIGHEST)
    inside = jnp.arange(n) < size
    others = inside[:, None] & ~jnp.eye(n, dtype=bool)
    nearest = jnp.where(others, distance, jnp.inf).min(axis=0)

    def step(state: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], Array]:
        to_chosen, free = state
        best = jnp.argmax(jnp.where(free, to_chosen, -jnp.inf))
        closer = jnp.where(number == 0, distance[best], jnp.minimum(to_chosen, distance[best]))
        return (closer, free.at[best].set(False)), best

    _, order = jax.lax.scan(step, (nearest, inside), jnp.arange(cap))
    return jnp.sort(jnp.where(jnp.arange(cap) < keep, order, n))
