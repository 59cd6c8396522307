"""HiPrune (ACL 2026 Findings): tokens that a middle block looks at with their neighbours, and those that a late block
looks at (16.3)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from reroute_jax.errors import one_of
from reroute_jax.nn.layers import take_rows
from reroute_jax.routing.kept import Kept
from reroute_jax.routing.ops import choose, compact_slots
from reroute_jax.routing.tower import Tower, TowerSizes
from reroute_jax.types import Grid

NEIGHBOURS = ("grid", "flat")


@dataclass(frozen=True)
class HiPrune(Kept):
    """alpha: share of the tokens for the anchors and their four neighbours. neighbours: on the grid, or "flat", whose
    left and right wrap around at the border and whose indices are clipped, as the release has it."""

    alpha: Fraction = Fraction(1, 10)
    neighbours: str = "grid"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("neighbours", self.neighbours, NEIGHBOURS)

    def arrays(self, grid: Grid, tokens: int) -> dict[str, np.ndarray]:
        keep = self.anchors(grid[0] * grid[1], grid)
        return {
            "grid": np.array(grid, np.int32),
            "keep": np.array(keep, np.int32),
            "anchors": np.array(self.object_anchors(keep), np.int32),
        }

    def object_anchors(self, keep: int) -> int:
        """Of an image that keeps so many tokens."""
        return round(keep * self.alpha / 5)

    def reduce(self, tower: Tower, arrays: dict[str, Array]) -> tuple[Float[Array, "I C E"], Int[Array, "I C"]]:
        features, registers = tower.features(), tower.registers()
        cap = self.cap(features.shape[1])
        inside = jnp.arange(features.shape[1]) < arrays["grid"].prod(axis=1)[:, None]
        near = near_anchors(
            jnp.where(inside, tower.objects(), -jnp.inf),
            arrays["grid"],
            arrays["anchors"],
            most=self.object_anchors(cap),
            flat=self.neighbours == "flat",
        )
        index = compact_slots(choose(registers, inside, arrays["keep"], cap, near, union=False), cap)
        return tower.project(take_rows(features, index)), jnp.minimum(index, features.shape[1])

    def macs(self, sizes: TowerSizes, grid: Grid) -> int:
        """Of two maps (20)."""
        return 2 * sizes.received_macs(grid[0] * grid[1])


def near_anchors(
    objects: Float[Array, "I n"], grid: Int[Array, "I 2"], anchors: Int[Array, " I"], *, most: int, flat: bool
) -> Bool[Array, "I n"]:
    """The `anchors`, at most `most`, tokens with the largest values, and their neighbours."""

    def one(values: Float[Array, " n"], shape: Int[Array, " 2"], count: Int[Array, ""]) -> Bool[Array, " n"]:
        rows, cols = shape
        _, best = jax.lax.top_k(values, most)
        y, x = jnp.divmod(best, cols)
        around = jnp.stack([best, best - 1, best + 1, best - cols, best + cols])
        there = jnp.stack([y >= 0, x > 0, x < cols - 1, y > 0, y < rows - 1])
        if flat:
            around, there = jnp.clip(around, 0, rows * cols - 1), jnp.ones_like(there)
        target = jnp.where(there & (jnp.arange(most) < count), around, values.shape[0])
        return jnp.zeros(values.shape, bool).at[target].set(True, mode="drop")

    if not most:
        return jnp.zeros(objects.shape, bool)
    return jax.vmap(one)(objects, grid, anchors)
