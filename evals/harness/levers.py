"""A schedule's levers taken apart: every combination of their levels at equal tokens, and what each level is worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

import numpy as np
from jaxtyping import Float

from evals.harness.metrics import Interval, Resampler, difference
from reroute_jax.errors import RerouteError
from reroute_jax.routing.floors import StrideGrid, stride_grid
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.solver import decision_layers, solve
from reroute_jax.types import Grid

# Levels of every lever; the first is what the others are held against.
LEVERS: dict[str, tuple[str, ...]] = {
    "positions": ("original", "renumber"),
    "coverage": ("none", "grid"),
    "layers": ("released", "every", "found"),
    "score": ("last_token", "last_token_unrotated", "value_similarity_own"),
    "action": ("delete", "reroute", "layout"),
}


@dataclass(frozen=True)
class Cell:
    """One combination. levels: by lever."""

    levels: tuple[tuple[str, str], ...]
    schedule: Schedule

    def level(self, lever: str) -> str:
        return dict(self.levels)[lever]

    def but(self, lever: str) -> tuple[tuple[str, str], ...]:
        """What has to be equal in a cell that this one is held against for a lever."""
        return tuple(pair for pair in self.levels if pair[0] != lever)


def cells(
    levers: Mapping[str, Sequence[str]],
    num_layers: int,
    grid: Grid,
    share: Fraction,
    shown: str,
    found_layers: Sequence[int] = (),
) -> list[Cell]:
    """Every combination of the levels for a decoder of `num_layers` layers and images of this grid, all with the same
    keep ratios for the same decision layers. share: of the visual tokens, averaged over the layers; shown: its name.
    found_layers: those that a search found for this budget, read by the level `found`.

    Raises RerouteError for a budget that a combination cannot reach.
    """
    return [
        Cell(
            tuple(zip(levers, levels, strict=True)),
            _schedule(dict(zip(levers, levels, strict=True)), num_layers, grid, share, shown, found_layers),
        )
        for levels in product(*levers.values())
    ]


def _schedule(
    levels: Mapping[str, str],
    num_layers: int,
    grid: Grid,
    share: Fraction,
    shown: str,
    found_layers: Sequence[int],
) -> Schedule:
    visual = grid[0] * grid[1]
    pyramid = decision_layers("pyramid", num_layers)
    layers = {
        "released": pyramid,
        "every": tuple(range(pyramid[0], num_layers)),
        "found": tuple(found_layers),
    }[levels["layers"]]
    # PDrop's pyramid has falling ratios, which suit every action. Elsewhere one ratio for all: what a search found
    # rises and falls, and a deletion cannot follow it.
    keep = solve("pyramid" if levels["layers"] == "released" else "flat", layers, num_layers, visual, share * visual)
    return Schedule.from_decisions(
        layers,
        keep,
        num_layers,
        levels["action"],
        position_mode=levels["positions"],
        score=levels["score"],
        floor=_floors(grid, [int(visual * ratio) for ratio in keep]) if levels["coverage"] == "grid" else None,
        label=" ".join([*levels.values(), shown]),
    )


def _floors(grid: Grid, counts: Sequence[int]) -> list[StrideGrid | None]:
    """The densest grid of strides that is at most half of what a decision keeps, where the first one has room for it;
    later ones that have no room go without."""
    strides = (stride for stride in range(2, max(grid) + 1) if 2 * stride_grid(grid, stride).sum() <= counts[0])
    stride = next(strides, None)
    if stride is None:
        raise RerouteError(
            f"a decision that keeps {counts[0]} tokens has no room for a grid: raise the budget, or leave the grid out "
            "(--levels coverage=none)"
        )
    held = int(stride_grid(grid, stride).sum())
    return [StrideGrid(stride) if 2 * held <= count else None for count in counts]


@dataclass(frozen=True)
class Effect:
    """What a level is worth in place of its lever's first one: the mean difference over all pairs of cells that are
    equal otherwise. within: the action that the cells have, "all" of them, or "reroute minus delete", how much more the
    level is worth with recovery. pairs: how many pairs of cells."""

    lever: str
    level: str
    against: str
    within: str
    pairs: int
    worth: Interval


def effects(
    found: Mapping[Cell, Float[np.ndarray, " questions"]], levers: Mapping[str, Sequence[str]], resampler: Resampler
) -> Iterator[Effect]:
    """found: the metric of every cell and question."""
    for lever, (first, *others) in levers.items():
        for level in others:
            pairs = [pair for pair in _pairs(found, lever, level, first)]
            yield Effect(lever, level, first, "all", len(pairs), _worth(found, pairs, resampler))
            if lever == "action" or not {"delete", "reroute"} <= set(levers["action"]):
                continue
            by_action = {
                action: [pair for pair in pairs if pair[0].level("action") == action]
                for action in ("delete", "reroute")
            }
            for action, own in by_action.items():
                yield Effect(lever, level, first, action, len(own), _worth(found, own, resampler))
            more = [_mean_difference(found, by_action[action])[:, None] for action in ("reroute", "delete")]
            [worth] = difference(*more, resampler)
            yield Effect(lever, level, first, "reroute minus delete", len(by_action["delete"]), worth)


def _pairs(found: Mapping[Cell, object], lever: str, level: str, first: str) -> Iterator[tuple[Cell, Cell]]:
    """(cell with the level, its equal with the lever's first one)."""
    base = {cell.but(lever): cell for cell in found if cell.level(lever) == first}
    for cell in found:
        if cell.level(lever) == level and cell.but(lever) in base:
            yield cell, base[cell.but(lever)]


def _worth(found, pairs: Sequence[tuple[Cell, Cell]], resampler: Resampler) -> Interval:
    column = _mean_difference(found, pairs)[:, None]
    [worth] = difference(column, np.zeros_like(column), resampler)
    return worth


def _mean_difference(found, pairs: Sequence[tuple[Cell, Cell]]) -> Float[np.ndarray, " questions"]:
    return np.mean([found[cell] - found[base] for cell, base in pairs], axis=0)
