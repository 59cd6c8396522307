"""Average pooling of visual tokens to a smaller grid before the decoder: the control `pool`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from reroute_jax.routing.plan import PoolMerge


def average_pool(
    features: Float[Array, "n D"], grid: tuple[int, int], rows: int, cols: int
) -> tuple[Float[Array, "cells D"], Int[np.ndarray, " cells"]]:
    """rows * cols averages in row-major order, in the features' dtype, and the index of each cell's centre patch.

    Cell r covers patch rows floor(r * h / rows) to ceil((r + 1) * h / rows), so cells overlap where h / rows is no
    integer; likewise columns. Centre indices ascend and are all different. Sums are fp32.
    Raises RerouteError for more cells than patches along a side, and for a grid that does not hold the features.
    """
    PoolMerge(rows, cols).tokens(features.shape[0], grid)
    across, row_centres = _windows(grid[0], rows)
    along, col_centres = _windows(grid[1], cols)
    cells = features.reshape(*grid, -1)
    # The fp32 weights make the whole product fp32.
    pooled = jnp.einsum("rh,cw,hwd->rcd", across, along, cells, precision=jax.lax.Precision.HIGHEST)
    centres = (row_centres[:, None] * grid[1] + col_centres).ravel()
    return pooled.reshape(rows * cols, -1).astype(features.dtype), centres


def _windows(size: int, cells: int) -> tuple[Float[np.ndarray, "cells size"], Int[np.ndarray, " cells"]]:
    """Averaging weights of each cell over 0..size-1, and the position at each cell's middle (the lower of two)."""
    index = np.arange(cells)
    low, high = index * size // cells, -(-(index + 1) * size // cells)
    inside = (np.arange(size) >= low[:, None]) & (np.arange(size) < high[:, None])
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32), (low + high - 1) // 2
