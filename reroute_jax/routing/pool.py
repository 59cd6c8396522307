"""Average pooling of visual tokens to a smaller grid before the decoder: the control `pool`. Host code."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def pool_weights(
    grid: tuple[int, int], cells: tuple[int, int]
) -> tuple[Float[np.ndarray, "cells n"], Int[np.ndarray, " cells"]]:
    """fp32 weights of each pooled cell over the n patches of a (rows, cols) grid, both row-major, and the index of each
    cell's centre patch.

    Cell r covers patch rows floor(r * h / rows) to ceil((r + 1) * h / rows), so cells overlap where h / rows is no
    integer; likewise columns. Centre indices ascend and are all different.
    """
    across, row_centres = _windows(grid[0], cells[0])
    along, col_centres = _windows(grid[1], cells[1])
    weights = np.einsum("rh,cw->rchw", across, along).reshape(cells[0] * cells[1], -1)
    return weights, (row_centres[:, None] * grid[1] + col_centres).ravel()


def _windows(size: int, cells: int) -> tuple[Float[np.ndarray, "cells size"], Int[np.ndarray, " cells"]]:
    """Averaging weights of each cell over 0..size-1, and the position at each cell's middle (the lower of two)."""
    index = np.arange(cells)
    low, high = index * size // cells, -(-(index + 1) * size // cells)
    inside = (np.arange(size) >= low[:, None]) & (np.arange(size) < high[:, None])
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32), (low + high - 1) // 2
