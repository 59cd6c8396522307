"""Scores that no model computes, for the controls `random` and `uniform`. Host code."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reroute_jax.errors import RerouteError
from reroute_jax.routing.plan import Schedule


def prior_scores(schedule: Schedule, grids: Sequence[tuple[int, int]], row_seed: int) -> np.ndarray:
    """float32 [decisions, visual]: scores of one row's visual tokens, all different, for a schedule with a prior.

    grids: (rows, cols) of the row's images in order. "random": a fresh draw after each decision that reroutes, the same
    draw after others (so that what is kept is nested). It depends on the schedule's seed, `row_seed` and the
    decision only, never on batch or padding. "uniform": the same regular order over each image at every decision.
    Raises RerouteError for a schedule without a prior.
    """
    if schedule.prior is None:
        raise RerouteError("the schedule has no prior, expected prior='random' or prior='uniform'")
    decisions, visual = len(schedule.decisions), sum(rows * cols for rows, cols in grids)
    if schedule.prior == "uniform":
        # Every image gives up its share at the same pace.
        progress = np.concatenate([uniform_rank(*grid).ravel() / (grid[0] * grid[1]) for grid in grids])
        order = np.empty(visual, np.int64)
        order[np.argsort(progress, kind="stable")] = np.arange(visual)
        return np.tile(-order.astype(np.float32), (decisions, 1))
    draws = np.cumsum([0, *(stage.action == "reroute" for stage in schedule.decisions)])[:-1].tolist()
    # Permutations instead of real numbers: float32 draws would tie now and then.
    scores = [np.random.default_rng([schedule.seed, row_seed, draw]).permutation(visual) for draw in draws]
    return np.array(scores, np.float32).reshape(decisions, visual)


def uniform_rank(rows: int, cols: int) -> np.ndarray:
    """int [rows, cols]: place of each cell in an ordered-dither (Bayer) sequence over the grid.

    Its first k cells are spread evenly for every k, and are a regular sub-grid wherever halving both sides leaves one:
    every second row and column at a quarter of the cells, every fourth at a sixteenth, and so on.
    """
    row_bits, col_bits = _halvings(rows), _halvings(cols)
    levels = max(row_bits.shape[1], col_bits.shape[1])
    key = np.zeros((rows, cols), np.int64)
    for level in range(levels):
        row = row_bits[:, level, None] if level < row_bits.shape[1] else 0
        col = col_bits[None, :, level] if level < col_bits.shape[1] else 0
        # Order inside a 2x2 block: the cell itself, its diagonal, then the other two.
        key = key * 4 + 2 * (row ^ col) + row
    rank = np.empty(rows * cols, np.int64)
    rank[np.argsort(key, axis=None, kind="stable")] = np.arange(rows * cols)
    return rank.reshape(rows, cols)


def _halvings(size: int) -> np.ndarray:
    """int [size, levels]: at each halving of 0..size-1 into every other one, 0 for the half that comes first.

    First comes the half that stands more centrally, so that a few cells do not all lean to one corner.
    """
    bits, chosen, spacing = [], 0, 1
    while spacing < size:
        offsets = (chosen, chosen + spacing)
        margins = [
            abs(size - 1 - start - (size - 1 - start) // (2 * spacing) * 2 * spacing - start) for start in offsets
        ]
        chosen = offsets[margins[1] < margins[0]]
        bits.append(((np.arange(size) - chosen) // spacing) % 2)
        spacing *= 2
    return np.array(bits, np.int64).reshape(len(bits), size).T
