import numpy as np
import pytest

from evals.harness.metrics import RESAMPLES, Resampler, difference, matrix, means, retention
from reroute_jax.errors import RerouteError


def names(count: int) -> tuple[str, ...]:
    return tuple(f"q{i}" for i in range(count))


def hits(count: int, of: int) -> np.ndarray:
    return (np.arange(of) < count).astype(np.float64)[:, None]


def test_means_leave_out_questions_a_metric_does_not_apply_to() -> None:
    scores = matrix([{"a": 1.0, "b": 0.0}, {"a": 0.0}, {"a": 1.0, "b": 1.0}], ["a", "b"])
    assert means(scores).tolist() == pytest.approx([2 / 3, 0.5])


def test_retention_of_a_run_against_itself_is_certain() -> None:
    """Paired draws: numerator and denominator are the same questions, so nothing is left to vary."""
    (kept,) = retention(hits(30, 100), hits(30, 100), Resampler(names(100)))
    assert (kept.value, kept.low, kept.high) == pytest.approx((100, 100, 100))


def test_retention_value_and_order_of_bounds() -> None:
    (kept,) = retention(hits(20, 100), hits(40, 100), Resampler(names(100)))
    assert kept.value == pytest.approx(50)
    assert kept.low < 50 < kept.high


def test_difference_interval_matches_the_normal_approximation() -> None:
    rng = np.random.default_rng(3)
    first = (rng.random((2000, 1)) < 0.6).astype(float)
    second = (rng.random((2000, 1)) < 0.5).astype(float)
    (delta,) = difference(first, second, Resampler(names(2000)))
    error = (first - second).std() / np.sqrt(2000)
    assert delta.value == pytest.approx((first - second).mean())
    assert (delta.low, delta.high) == pytest.approx(
        (delta.value - 1.96 * error, delta.value + 1.96 * error), abs=0.15 * error
    )


def test_clusters_are_drawn_together() -> None:
    """Ten copies of each of 50 questions say no more than the 50: ignoring that would narrow the interval threefold."""
    once = np.random.default_rng(0).random((50, 1))
    zero = np.zeros_like(once)
    (single,) = difference(once, zero, Resampler(names(50)))
    (tenfold,) = difference(
        np.repeat(once, 10, axis=0), np.repeat(zero, 10, axis=0), Resampler(tuple(np.repeat(names(50), 10)))
    )
    assert (tenfold.low, tenfold.high) == pytest.approx((single.low, single.high))


def test_cluster_means_weigh_rows_not_clusters() -> None:
    """A draw's mean is over its expressions, like the metric itself."""
    scores = np.array([[1.0], [1.0], [1.0], [0.0]])
    draws = Resampler(("a", "a", "a", "b")).means(scores)
    assert set(np.round(draws[:, 0], 12)) == {0.0, 0.75, 1.0}


def test_draws_depend_on_the_seed_alone() -> None:
    scores = np.random.default_rng(0).random((40, 2))
    first, again, other = (Resampler(names(40), seed).means(scores) for seed in (1, 1, 2))
    assert first.shape == (RESAMPLES, 2)
    assert (first == again).all()
    assert (first != other).any()


def test_undefined_retention_has_no_value_and_too_few_hits_no_bounds() -> None:
    resampler = Resampler(names(50))
    (nothing,) = retention(hits(0, 50), hits(0, 50), resampler)
    assert (nothing.value, nothing.low, nothing.high) == (None, None, None)
    (one,) = retention(hits(1, 50), hits(1, 50), resampler)
    assert (one.value, one.low, one.high) == (pytest.approx(100), None, None)


def test_a_metric_of_some_questions_only_is_resampled_over_those() -> None:
    applies = np.where(np.arange(60)[:, None] % 2, np.nan, 1.0)
    draws = Resampler(names(60)).means(np.column_stack([applies, np.ones(60)]))
    assert np.allclose(draws, 1.0)


def test_labels_that_do_not_fit_the_rows_are_refused() -> None:
    with pytest.raises(RerouteError, match="3 rows of metrics for 2 cluster labels"):
        Resampler(("a", "b")).means(np.zeros((3, 1)))


def test_one_cluster_alone_has_no_interval() -> None:
    """Whatever is drawn of it is the same: an interval of no width would look like certainty."""

    def points(found: np.ndarray) -> np.ndarray:
        return np.nan_to_num(found)

    for clusters, known in ((("a", "a"), False), (("a", "b"), True)):
        (kept,) = retention(hits(1, 2), hits(2, 2), Resampler(clusters), points)
        (gain,) = difference(hits(1, 2), hits(2, 2), Resampler(clusters), points)
        assert (kept.value, gain.value) == (50, -0.5)
        assert [one is not None for one in (kept.low, kept.high, gain.low, gain.high)] == [known] * 4
