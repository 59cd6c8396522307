"""Average pooling of visual tokens to a smaller grid before the decoder: the control `pool`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from reroute_jax.errors import RerouteError
from reroute_jax.routing.kept import check_grid
from reroute_jax.routing.solver import pool_grid
from reroute_jax.routing.tower import Tower, TowerSizes
from reroute_jax.types import Grid


@dataclass(frozen=True)
class PoolMerge:
    """Average pooling of the features to at most `share` of an image's tokens before the decoder (a control)."""

    share: Fraction

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise RerouteError(f"pooling keeps a share of {self.share}, expected a fraction in (0, 1]")

    def cells(self, visual: int, grid: tuple[int, int]) -> tuple[int, int]:
        """(rows, cols) that `visual` patches on a (rows, cols) grid are pooled to."""
        check_grid(visual, grid)
        return pool_grid(grid, self.cap(visual))

    def anchors(self, visual: int, grid: tuple[int, int]) -> int:
        """The tokens left of `visual` patches on a (rows, cols) grid."""
        return math.prod(self.cells(visual, grid))

    def cap(self, visual: int) -> int:
        """The most that can be left of up to `visual` patches."""
        return int(self.share * visual)

    def arrays(self, grid: Grid, tokens: int) -> dict[str, np.ndarray]:
        """Weights of the cells over up to `tokens` tokens, and the cells' centre tokens; no weights behind them."""
        cap, size = self.cap(tokens), grid[0] * grid[1]
        pool, centre = np.zeros((cap, tokens), np.float32), np.zeros(cap, np.int32)
        weights, centres = pool_weights(grid, self.cells(size, grid))
        pool[: len(weights), :size], centre[: len(weights)] = weights, centres
        return {"pool": pool, "centre": centre}

    def reduce(self, tower: Tower, arrays: dict[str, Array]) -> tuple[Float[Array, "I C E"], Int[Array, "I C"]]:
        """Averages (fp32 sums) of features at decoder width."""
        features = tower.project(tower.features())
        # The fp32 weights make the whole product fp32.
        averages = jnp.einsum("Icn,InD->IcD", arrays["pool"], features, precision=jax.lax.Precision.HIGHEST)
        return averages.astype(features.dtype), jnp.asarray(arrays["centre"])

    def macs(self, sizes: TowerSizes, grid: Grid) -> int:
        """Of the averages: every token takes part in one."""
        return grid[0] * grid[1] * sizes.projected

    def members(self, tower: Tower, arrays: dict[str, Array]) -> Bool[Array, "I C n"]:
        return jnp.asarray(arrays["pool"]) > 0


def pool_weights(
    grid: tuple[int, int], cells: tuple[int, int]
) -> tuple[Float[np.ndarray, "cells n"], Int[np.ndarray, " cells"]]:
    """fp32 weights of each pooled cell over the n patches of a (rows, cols) grid, both row-major, and the index of each
    cell's centre patch.

    Cell r covers patch rows floor(r * h / rows) to ceil((r + 1) * h / rows), so cells overlap where h / rows is no
    integer; likewise columns. Centre indices ascend and are all different.
    """
    across, along = (_windows(size, count)[0] for size, count in zip(grid, cells, strict=True))
    weights = np.einsum("rh,cw->rchw", across, along).reshape(cells[0] * cells[1], -1)
    return weights, cell_centres(grid, cells)


def cell_centres(grid: Grid, cells: Grid) -> Int[np.ndarray, " cells"]:
    """The index of each cell's centre patch."""
    rows, cols = (_windows(size, count)[1] for size, count in zip(grid, cells, strict=True))
    return (rows[:, None] * grid[1] + cols).ravel()


def _windows(size: int, cells: int) -> tuple[Float[np.ndarray, "cells size"], Int[np.ndarray, " cells"]]:
    """Averaging weights of each cell over 0..size-1, and the position at each cell's middle (the lower of two)."""
    index = np.arange(cells)
    low, high = index * size // cells, -(-(index + 1) * size // cells)
    inside = (np.arange(size) >= low[:, None]) & (np.arange(size) < high[:, None])
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32), (low + high - 1) // 2
