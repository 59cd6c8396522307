"""Means over questions, and paired bootstrap intervals for ratios and differences of such means."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from reroute_jax.errors import RerouteError

RESAMPLES = 2000
DRAWN_AT_ONCE = 2**18  # numbers
CONFIDENCE = 0.95

# Means of columns -> metrics made from them, both along the last axis; any axes before it are resamples.
Estimate = Callable[[Float[np.ndarray, "*draws columns"]], Float[np.ndarray, "*draws names"]]
# A metric made from the means of named columns, each an array with one number a resample.
Derived = Callable[[Mapping[str, np.ndarray]], np.ndarray]


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

    def told(self, draws: Float[np.ndarray, "resamples names"]) -> Float[np.ndarray, "resamples names"]:
        """Draws of metrics, NaN where there is one cluster alone: they are all alike and tell nothing."""
        return draws if len(set(self.clusters)) > 1 else np.full_like(draws, np.nan)

    def means(self, columns: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, "resamples columns"]:
        """Mean of each column, without its NaNs, in each of RESAMPLES draws of as many clusters as there are."""
        labels, cluster = np.unique(np.array(self.clusters), return_inverse=True)
        if len(cluster) != len(columns):
            raise RerouteError(f"{len(columns)} rows of metrics for {len(cluster)} cluster labels, expected one each")
        sums = np.zeros((len(labels), 2 * columns.shape[1]))
        np.add.at(sums, cluster, np.column_stack([np.nan_to_num(columns), ~np.isnan(columns)]))
        totals = np.empty((RESAMPLES, sums.shape[1]))
        for number, drawn in enumerate(self._draws(len(labels))):
            totals[number] = np.bincount(drawn, minlength=len(labels)) @ sums
        values, counts = np.split(totals, 2, axis=1)
        with np.errstate(invalid="ignore"):
            return values / counts

    def _draws(self, clusters: int) -> Iterator[Int[np.ndarray, " clusters"]]:
        """RESAMPLES of them, many from one call: a call takes longer than the numbers of a small draw."""
        rng, many = np.random.default_rng(self.seed), max(1, DRAWN_AT_ONCE // clusters)
        for first in range(0, RESAMPLES, many):
            yield from rng.integers(clusters, size=(min(many, RESAMPLES - first), clusters))


def matrix(scores: Sequence[Mapping[str, float]], names: Sequence[str]) -> Float[np.ndarray, "rows names"]:
    """One row per question; NaN where a metric does not apply to it."""
    return np.array([[score.get(name, np.nan) for name in names] for score in scores], np.float64)


def means(scores: Float[np.ndarray, "rows names"]) -> Float[np.ndarray, " names"]:
    """Plain mean over the questions that each metric applies to."""
    return np.nanmean(scores, axis=0)


def estimator(columns: Sequence[str], names: Sequence[str], derived: Mapping[str, Derived]) -> Estimate:
    """Each of `names` is one of `derived`, or else the mean of the column of that name."""

    def estimate(found: Float[np.ndarray, "*draws columns"]) -> Float[np.ndarray, "*draws names"]:
        by_column = dict(zip(columns, np.moveaxis(found, -1, 0), strict=True))
        values = [derived[name](by_column) if name in derived else by_column[name] for name in names]
        return np.stack([np.broadcast_to(value, found.shape[:-1]) for value in values], axis=-1)

    return estimate


def ratio(part: np.ndarray | float, whole: np.ndarray | float) -> np.ndarray:
    """part / whole, and 0 where `whole` is 0."""
    part, whole = np.broadcast_arrays(np.asarray(part, np.float64), whole)
    return np.divide(part, whole, out=np.zeros(part.shape), where=whole != 0)


def _plain(found: np.ndarray) -> np.ndarray:
    return found


def retention(
    kept: Float[np.ndarray, "rows columns"],
    full: Float[np.ndarray, "rows columns"],
    resampler: Resampler,
    estimate: Estimate = _plain,
) -> list[Interval]:
    """100 * kept / full, a percentage, for each metric over the same questions. estimate: makes metrics from means."""
    (first, second), draws = _paired(kept, full, resampler, estimate)
    with np.errstate(divide="ignore", invalid="ignore"):
        return _intervals(100 * first / second, 100 * draws[0] / draws[1])


def difference(
    first: Float[np.ndarray, "rows columns"],
    second: Float[np.ndarray, "rows columns"],
    resampler: Resampler,
    estimate: Estimate = _plain,
) -> list[Interval]:
    """first - second for each metric over the same questions. estimate: makes metrics from means."""
    values, draws = _paired(first, second, resampler, estimate)
    return _intervals(values[0] - values[1], draws[0] - draws[1])


def _paired(
    first: np.ndarray, second: np.ndarray, resampler: Resampler, estimate: Estimate
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The metrics of both runs, over all questions and over each draw of them."""
    draws = np.split(resampler.means(np.column_stack([first, second])), 2, axis=1)
    return [estimate(means(first)), estimate(means(second))], [resampler.told(estimate(draw)) for draw in draws]


def _intervals(values: Float[np.ndarray, " names"], draws: Float[np.ndarray, "resamples names"]) -> list[Interval]:
    return [interval(value, draw) for value, draw in zip(values, draws.T, strict=True)]


def interval(value: float, draws: Float[np.ndarray, " resamples"]) -> Interval:
    """An estimate with the middle CONFIDENCE of its resamples."""
    if not np.isfinite(value):
        return Interval(None, None, None)
    if not np.isfinite(draws).all():
        return Interval(float(value), None, None)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Interval(float(value), float(low), float(high))
