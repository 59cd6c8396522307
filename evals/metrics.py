"""Means over questions, and paired bootstrap intervals for ratios and differences of such means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from reroute_jax.errors import RerouteError

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its bootstrap interval; the bounds are None where too few hits leave it undefined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Resampler:
    """The same resamples for every column: what makes the intervals paired.

    clusters: one label a row; rows that share one (the expressions of one object) are drawn together, because their
    answers depend on each other. seed: of the draws.
    """

    clusters: tuple[str, ...]
    seed: int = 0

    def means(self, columns: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, "resamples columns"]:
        """Mean of each column in each of RESAMPLES draws, with replacement, of as many clusters as there are."""
        labels, cluster = np.unique(np.array(self.clusters), return_inverse=True)
        if len(cluster) != len(columns):
            raise RerouteError(f"{len(columns)} rows of metrics for {len(cluster)} cluster labels, expected one each")
        sums = np.zeros((len(labels), columns.shape[1] + 1))
        np.add.at(sums, cluster, np.column_stack([columns, np.ones(len(columns))]))
        rng = np.random.default_rng(self.seed)
        totals = np.empty((RESAMPLES, sums.shape[1]))
        for draw in range(RESAMPLES):
            totals[draw] = np.bincount(rng.integers(len(labels), size=len(labels)), minlength=len(labels)) @ sums
        return totals[:, :-1] / totals[:, -1:]


def retention(
    kept: Float[np.ndarray, "rows metrics"], full: Float[np.ndarray, "rows metrics"], resampler: Resampler
) -> list[Interval]:
    """100 * mean(kept) / mean(full), a percentage, for each metric over the same questions."""
    means = np.split(resampler.means(np.column_stack([kept, full])), 2, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = 100 * kept.mean(axis=0) / full.mean(axis=0)
        draws = 100 * means[0] / means[1]
    return [_interval(value[i], draws[:, i]) for i in range(kept.shape[1])]


def difference(
    first: Float[np.ndarray, "rows metrics"], second: Float[np.ndarray, "rows metrics"], resampler: Resampler
) -> list[Interval]:
    """mean(first - second) for each metric over the same questions."""
    delta = first - second
    draws = resampler.means(delta)
    return [_interval(value, draws[:, i]) for i, value in enumerate(delta.mean(axis=0))]


def _interval(value: float, draws: Float[np.ndarray, " resamples"]) -> Interval:
    if not np.isfinite(value):
        return Interval(None, None, None)
    if not np.isfinite(draws).all():
        return Interval(float(value), None, None)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Interval(float(value), float(low), float(high))
