"""Nuwa's stage 1 (4.3, 5.3) and pooling, in PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ImageTensors:
    """One image of a prompt. features [n, D] as the decoder gets them; index [n]: the original visual token that gives
    each its position; grid: (rows, columns) of the visual tokens before any merge. placed: whether each stands where
    that token did, and not one behind the other. members: Bool [n, tokens], those that each was made of; None without a
    merge."""

    features: Tensor
    index: Tensor
    grid: tuple[int, int]
    placed: bool = True
    members: Tensor | None = None

    @property
    def count(self) -> int:
        return math.prod(self.grid)


def nuwa_stage_one(
    metric: Tensor,
    features: Tensor,
    similarity: Tensor,
    *,
    columns: int,
    top_n: int,
    keep: int,
    radius: float,
    quantile: Fraction,
    self_weight_override: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Merged features [N1, C], the anchors [N1], ascending, and Bool [N1, n], the patches that each one's sum is of:
    sections 4.3 and 5.3 step by step, one patch at a time.

    metric [n], features [n, C], similarity [n, C'] in row-major order of a grid with `columns` columns. `keep` is
    limited to the number of candidates. The cells that pad an odd side score zero, below any real patch, and would be
    dropped again (5.3), so they are never made.
    """
    values = metric.tolist()
    candidates = _candidates(values, columns, top_n)
    anchors = sorted(sorted(candidates, key=lambda p: (-values[p], p))[:keep])
    threshold = _quantile(metric[anchors], quantile)
    unit = similarity / similarity.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    merged, members = [], []
    for anchor in anchors:
        if metric[anchor] >= threshold:
            weights = torch.zeros(len(values))
            weights[anchor] = (unit[anchor] @ unit[anchor]).relu()
        else:
            weights = (unit @ unit[anchor]).relu() * _penalty(anchor, len(values), columns, radius)
        weights = weights / (weights.sum() + 1e-8)
        if self_weight_override:
            weights[anchor] = 1.0
        merged.append(weights.to(features.dtype) @ features)
        members.append(weights > 0)
    return torch.stack(merged), torch.tensor(anchors), torch.stack(members)


def _candidates(values: list[float], columns: int, top_n: int) -> list[int]:
    """The `top_n` best patches of each 2x2 region; of equal ones the first in (dy, dx) order."""
    rows, chosen = len(values) // columns, []
    for top in range(0, rows, 2):
        for left in range(0, columns, 2):
            region = [
                columns * y + x for y in range(top, min(top + 2, rows)) for x in range(left, min(left + 2, columns))
            ]
            chosen += sorted(region, key=lambda p: -values[p])[:top_n]
    return chosen


def _penalty(anchor: int, count: int, columns: int, radius: float) -> Tensor:
    """[count]: 1 at the anchor, falling linearly with Euclidean distance to 0 at the radius."""
    y, x = divmod(anchor, columns)
    distance = [math.dist((y, x), divmod(patch, columns)) for patch in range(count)]
    return 1 - (torch.tensor(distance) / radius).clamp(max=1)


def _quantile(values: Tensor, quantile: Fraction) -> Tensor:
    """Linear interpolation between the two sorted values around index quantile * (N - 1)."""
    ordered, place = values.sort().values, quantile * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return ordered[low] + float(place - low) * (ordered[high] - ordered[low])


def pool(features: Tensor, grid: tuple[int, int], cells: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Averages over the (rows, cols) cells of a (rows, cols) grid, and the index of the patch in each cell's middle.

    Cell r covers floor(r * side / rows) to ceil((r + 1) * side / rows); of two middle patches it is the first.
    """
    image = features.float().T.reshape(1, -1, *grid)
    pooled = nn.functional.adaptive_avg_pool2d(image, cells)[0].flatten(1).T.to(features.dtype)
    return pooled, middles(grid, cells)


def middles(grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """The index of the patch in the middle of each of (rows, cols) cells of a (rows, cols) grid."""
    rows, cols = (
        [(r * side // count + math.ceil((r + 1) * side / count) - 1) // 2 for r in range(count)]
        for side, count in zip(grid, cells, strict=True)
    )
    return torch.tensor([grid[1] * y + x for y in rows for x in cols])
