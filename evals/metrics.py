"""Means over questions, and paired bootstrap intervals for ratios and differences of such means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from reroute_jax.errors import RerouteError

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its bootstrap interval. None: undefined, as where the full run has no hits to keep."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Resampler:
    """Draws the same questions for every column given to it: what makes its intervals paired.

    clusters: one label a row; rows that share one (the expressions of one object) are drawn together, because their
    answers depend on each other. seed: of the draws.
    """

    clusters: tuple[str, ...]
    seed: int = 0

    def means(self, columns: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, "resamples columns"]:
        """Mean of each column, without its NaNs, in each of RESAMPLES draws of as many clusters as there are."""
        labels, cluster = np.unique(np.array(self.clusters), return_inverse=True)
        if len(cluster) != len(columns):
            raise RerouteError(f"{len(columns)} rows of metrics for {len(cluster)} cluster labels, expected one each")
        sums = np.zeros((len(labels), 2 * columns.shape[1]))
        np.add.at(sums, cluster, np.column_stack([np.nan_to_num(columns), ~np.isnan(columns)]))
        rng = np.random.default_rng(self.seed)
        totals = np.empty((RESAMPLES, sums.shape[1]))
        for draw in range(RESAMPLES):
            totals[draw] = np.bincount(rng.integers(len(labels), size=len(labels)), minlength=len(labels)) @ sums
        values, counts = np.split(totals, 2, axis=1)
        with np.errstate(invalid="ignore"):
            return values / counts


def matrix(scores: Sequence[Mapping[str, float]], names: Sequence[str]) -> Float[np.ndarray, "rows names"]:
    """One row per question; NaN where a metric does not apply to it."""
    return np.array([[score.get(name, np.nan) for name in names] for score in scores], np.float64)


def means(scores: Float[np.ndarray, "rows names"]) -> Float[np.ndarray, " names"]:
    """Plain mean over the questions that each metric applies to."""
    return np.nanmean(scores, axis=0)


def retention(
    kept: Float[np.ndarray, "rows names"], full: Float[np.ndarray, "rows names"], resampler: Resampler
) -> list[Interval]:
    """100 * mean(kept) / mean(full), a percentage, for each metric over the same questions."""
    draws = np.split(resampler.means(np.column_stack([kept, full])), 2, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return _intervals(100 * means(kept) / means(full), 100 * draws[0] / draws[1])


def difference(
    first: Float[np.ndarray, "rows names"], second: Float[np.ndarray, "rows names"], resampler: Resampler
) -> list[Interval]:
    """mean(first - second) for each metric over the same questions."""
    return _intervals(means(first - second), resampler.means(first - second))


def _intervals(values: Float[np.ndarray, " names"], draws: Float[np.ndarray, "resamples names"]) -> list[Interval]:
    tail = 100 * (1 - CONFIDENCE) / 2
    return [_interval(value, draw, [tail, 100 - tail]) for value, draw in zip(values, draws.T, strict=True)]


def _interval(value: float, draws: Float[np.ndarray, " resamples"], percentiles: list[float]) -> Interval:
    if not np.isfinite(value):
        return Interval(None, None, None)
    if not np.isfinite(draws).all():
        return Interval(float(value), None, None)
    low, high = np.percentile(draws, percentiles)
    return Interval(float(value), float(low), float(high))
