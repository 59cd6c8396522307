"""Reductions before the decoder in PyTorch: one function each, on one image (4.3, 5.3, 7.4, 16)."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor

from convert.crosscheck.nuwa import ImageTensors, middles, nuwa_stage_one, pool
from reroute_jax.routing.divprune import DivPrune
from reroute_jax.routing.downsample import Downsample
from reroute_jax.routing.hiprune import HiPrune
from reroute_jax.routing.merge import Merge
from reroute_jax.routing.nuwa import NuwaMerge
from reroute_jax.routing.pool import PoolMerge
from reroute_jax.routing.visionzip import VisionZip

Grid = tuple[int, int]
# Features at decoder width, the token that each stands for, and Bool [left, n], the tokens that each was made of.
Reduced = tuple[Tensor, Tensor, Tensor]


class TorchTower(Protocol):
    """One image in a family's tower; every method gives a row or value for each token of its (rows, cols) `grid`."""

    grid: Grid

    def features(self) -> Tensor: ...
    def project(self, features: Tensor) -> Tensor: ...
    def class_features(self) -> Tensor: ...
    def metric(self) -> Tensor: ...
    def similarity(self, order: str) -> Tensor: ...
    def radius(self) -> float: ...
    def keys(self) -> Tensor: ...
    def objects(self) -> Tensor: ...
    def registers(self) -> Tensor: ...
    def resized(self, cells: Grid, back: bool) -> TorchTower: ...


def reduced(merge: Merge | None, tower: TorchTower) -> ImageTensors:
    """The image as the decoder gets it."""
    if merge is None:
        return ImageTensors(tower.project(tower.features()), torch.arange(math.prod(tower.grid)), tower.grid)
    placed = not (isinstance(merge, VisionZip) and merge.cls == "keep")
    features, kept, members = _RULES[type(merge)](merge, tower)
    return ImageTensors(features, kept, tower.grid, placed, members)


def nuwa(merge: NuwaMerge, tower: TorchTower) -> Reduced:
    merged, anchors, members = nuwa_stage_one(
        tower.metric(),
        tower.features(),
        tower.similarity(merge.sim_order),
        columns=tower.grid[1],
        top_n=merge.top_n,
        keep=math.ceil(merge.share * math.prod(tower.grid)),
        radius=tower.radius(),
        quantile=merge.quantile,
        self_weight_override=merge.self_weight_override,
    )
    return tower.project(merged), anchors, members


def pooled(merge: PoolMerge, tower: TorchTower) -> Reduced:
    cells = merge.cells(math.prod(tower.grid), tower.grid)
    return *pool(tower.project(tower.features()), tower.grid, cells), covered(tower.grid, cells)


def downsampled(merge: Downsample, tower: TorchTower) -> Reduced:
    smaller = tower.resized(smaller_grid(merge, tower.grid), merge.blur)
    places = middles(tower.grid, smaller.grid), covered(tower.grid, smaller.grid)
    return smaller.project(smaller.features()), *places


def smaller_grid(merge: Downsample, grid: Grid) -> Grid:
    """Of all that have no more tokens than asked for those with most, then the least stretched, then the tallest
    (16.4)."""
    tokens = grid[0] * grid[1] * merge.share if merge.count is None else merge.count
    every = [(rows, cols) for rows in range(1, grid[0] + 1) for cols in range(1, grid[1] + 1)]
    fitting = [(r, c) for r, c in every if r * c <= max(1, tokens) and (r == c or not merge.square)]

    def stretch(rows: int, cols: int) -> Fraction:
        return max(Fraction(rows * grid[1], cols * grid[0]), Fraction(cols * grid[0], rows * grid[1]))

    return sorted(fitting, key=lambda cells: (-cells[0] * cells[1], stretch(*cells), -cells[0]))[0]


def bicubic(image: Tensor, size: tuple[int, int]) -> Tensor:
    """`[1, 3, H, W]` resized to (height, width) as Pillow does it, which sums up in float64 as well."""
    return torch.nn.functional.interpolate(image.double(), size, mode="bicubic", antialias=True).to(image.dtype)


def divprune(merge: DivPrune, tower: TorchTower) -> Reduced:
    features = tower.project(tower.features())
    kept = torch.tensor(sorted(farthest(features, _count(merge, tower))))
    return features[kept], kept, alone(kept, tower)


def farthest(features: Tensor, count: int) -> list[int]:
    """In the order in which they are chosen: each time the token whose nearest chosen one is farthest away, and first
    the one whose nearest neighbour is (16.1)."""
    unit = features.float() / features.float().norm(dim=-1, keepdim=True)
    distance = 1 - unit @ unit.T
    nearest = distance.masked_fill(torch.eye(len(unit), dtype=torch.bool), torch.inf).min(dim=0).values
    chosen = [int(nearest.argmax())]
    while len(chosen) < count:
        gap = distance[chosen].min(dim=0).values
        gap[chosen] = -torch.inf
        chosen.append(int(gap.argmax()))
    return chosen


def hiprune(merge: HiPrune, tower: TorchTower) -> Reduced:
    count = _count(merge, tower)
    anchors = _best(tower.objects(), range(math.prod(tower.grid)), round(count * merge.alpha / 5))
    near = sorted({cell for anchor in anchors for cell in around(anchor, tower.grid, merge.neighbours == "flat")})
    rest = [cell for cell in range(math.prod(tower.grid)) if cell not in near]
    kept = torch.tensor(sorted([*near, *_best(tower.registers(), rest, count - len(near))]))
    return tower.project(tower.features()[kept]), kept, alone(kept, tower)


def around(cell: int, grid: Grid, flat: bool) -> list[int]:
    """A cell and its neighbours; `flat` ones are index arithmetic, clipped at the ends (16.3)."""
    rows, cols = grid
    if flat:
        return [min(max(cell + step, 0), rows * cols - 1) for step in (0, -1, 1, -cols, cols)]
    y, x = divmod(cell, cols)
    there = ((y, x), (y, x - 1), (y, x + 1), (y - 1, x), (y + 1, x))
    return [row * cols + col for row, col in there if 0 <= row < rows and 0 <= col < cols]


def visionzip(merge: VisionZip, tower: TorchTower) -> Reduced:
    count = _count(merge, tower)
    contextual = max(1, round(count * 5 / 32))
    features, keys, size = tower.features(), tower.keys(), math.prod(tower.grid)
    released = merge.cls == "keep"
    dominant = _best(tower.metric(), range(size), count - contextual - released)
    rest = [cell for cell in range(size) if cell not in dominant]
    step = max(1, len(rest) // contextual)
    targets = [rest[number * step] for number in range(contextual)]
    found = groups(keys, [cell for cell in rest if cell not in targets], targets)
    joined, members = group_means(features, found), torch.eye(size, dtype=torch.bool)
    for target, group in found.items():
        members[target, group] = True
    if released:
        patches = torch.tensor([*sorted(dominant), *targets])
        rows = torch.cat([tower.class_features()[None], joined[patches]])
        patches = torch.cat([patches[:1], patches])
        return tower.project(rows), patches, members[patches]
    kept = torch.tensor(sorted([*dominant, *targets]))
    return tower.project(joined[kept]), kept, members[kept]


def groups(keys: Tensor, others: list[int], targets: list[int]) -> dict[int, list[int]]:
    """Of each target the others that are most like it (16.2)."""
    unit = keys / keys.norm(dim=-1, keepdim=True)
    found: dict[int, list[int]] = {target: [] for target in targets}
    for other in others:
        found[targets[int((unit[targets] @ unit[other]).argmax())]].append(other)
    return found


def group_means(features: Tensor, found: dict[int, list[int]]) -> Tensor:
    """The features, with the mean of its group added to each target (16.2)."""
    joined = features.clone()
    for target, group in found.items():
        if group:
            joined[target] = (features[target].float() + features[group].float().mean(dim=0)).to(features.dtype)
    return joined


def alone(kept: Tensor, tower: TorchTower) -> Tensor:
    """Members of tokens that stand for themselves."""
    return torch.nn.functional.one_hot(kept, math.prod(tower.grid)).bool()


def covered(grid: Grid, cells: Grid) -> Tensor:
    """Bool [cells, n]: the tokens in each of (rows, cols) cells of a (rows, cols) grid."""
    found = torch.zeros(*cells, *grid, dtype=torch.bool)
    for row in range(cells[0]):
        for col in range(cells[1]):
            found[row, col][_span(row, grid[0], cells[0]), _span(col, grid[1], cells[1])] = True
    return found.reshape(math.prod(cells), -1)


def _span(number: int, side: int, count: int) -> slice:
    return slice(number * side // count, math.ceil((number + 1) * side / count))


def _count(merge: DivPrune | HiPrune | VisionZip, tower: TorchTower) -> int:
    """To nearest, halves to even (16.1)."""
    visual = math.prod(tower.grid)
    return min(visual, merge.count) if merge.count is not None else max(1, round(merge.share * visual))


def _best(values: Tensor, among: range | list[int], count: int) -> list[int]:
    """The `count` of `among` with the largest values; of equal ones the lowest."""
    numbers = values.tolist()
    return sorted(among, key=lambda cell: (-numbers[cell], cell))[:count]


_RULES: dict[type, Callable] = {
    NuwaMerge: nuwa,
    PoolMerge: pooled,
    Downsample: downsampled,
    DivPrune: divprune,
    HiPrune: hiprune,
    VisionZip: visionzip,
}
