"""Visual tokens that a decision must keep, in PyTorch (14): one function a floor, one token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from reroute_jax.routing.floors import RotaryAnchors, StrideGrid

Grid = tuple[int, int]


def floor_of(
    floor: StrideGrid | RotaryAnchors, grids: Sequence[Grid], positions: Tensor, keep: int, theta: float, dim: int
) -> list[int]:
    """Original visual indices that a floor holds, its seeds aside. positions [C, n]: of all routed visual tokens."""
    held, first = [], 0
    for rows, cols in grids:
        count = rows * cols
        if isinstance(floor, StrideGrid):
            own = stride_grid((rows, cols), floor.stride)
        else:
            base = Fraction(keep * count, positions.shape[1]) if floor.of_kept else count
            own = rotary_anchors(positions[:, first : first + count], round(floor.share * base), theta, dim)
        held += [first + index for index in own]
        first += count
    return held


def stride_grid(grid: Grid, stride: int) -> list[int]:
    """Every `stride`-th row and column from the corner on (14.1)."""
    rows, cols = grid
    return [y * cols + x for y in range(rows) for x in range(cols) if y % stride == x % stride == 0]


def rotary_anchors(positions: Tensor, count: int, theta: float, dim: int) -> list[int]:
    """The `count` tokens of `positions [C, n]` with the largest mean cosine, and those with the largest mean sine; of
    equal ones the first (14.2)."""
    frequency = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    chosen = set()
    for turn in (torch.cos, torch.sin):
        channels = [turn(channel.double()[:, None] * frequency).mean(dim=1).float() for channel in positions]
        total = channels[0] if len(channels) == 1 else channels[0] + (channels[1] + channels[2])
        chosen |= set(torch.argsort(-total, stable=True)[:count].tolist())
    return sorted(chosen)
