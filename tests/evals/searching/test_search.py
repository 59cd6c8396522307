"""The search loop on a landscape that is known."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from evals.searching.calibration import task_means
from evals.searching.candidates import HAND_SET, Candidate, fitted
from evals.searching.outcome import shown
from evals.searching.search import SCREENED, Effort, Ledger, Search, gate, there_and_back, worth
from tests.evals.searching.stand_ins import CHUNK, SPACE, Planner, Prompts, budget

THIRD, NINTH = Fraction(1, 3), Fraction(1, 9)
BUDGETS = {share: budget(share) for share in (THIRD, NINTH)}
STARTS = {share: fitted(Planner(), HAND_SET, SPACE, limit) for share, limit in BUDGETS.items()}


def searched(seed=0, prompts=None, rounds=4, seconds=1e9, **more) -> Search:
    search = Search(Ledger(SPACE, prompts or Prompts()), BUDGETS, STARTS, seed)
    search.run(Effort(rounds, seconds), lambda share, best: None, **more)
    return search


def test_it_finds_better_ones_and_depends_on_the_seed_alone():
    first, again, other = searched(), searched(), searched(seed=1, rounds=1)
    assert first.pool == again.pool and first.pool != other.pool
    by_hand = {share: min(map(first.ledger.decide, STARTS[share])) for share in BUDGETS}
    assert first.ledger.decide(first.pool[THIRD][0]) < by_hand[THIRD]
    for share in BUDGETS:
        assert first.ledger.decide(first.pool[share][0]) <= by_hand[share]
        assert all(BUDGETS[share].holds(one) for one in first.pool[share])
    assert set(first.stopped.values()) == {"rounds"}


def test_each_prompt_is_run_once_for_a_schedule():
    prompts = Prompts()
    searched(prompts=prompts)
    assert len(set(prompts.asked_for)) == len(prompts.asked_for)
    screening = SCREENED // CHUNK
    assert {chunks for _, *chunks in map(list, prompts.asked_for) for chunks in [tuple(chunks)]} == {
        (0, screening),
        (screening, None),
    }


def test_time_ends_a_visit_between_rounds():
    ticks = iter(range(1000))
    search = searched(rounds=40, seconds=5, clock=lambda: next(ticks))
    assert search.stopped == {THIRD: "minutes", NINTH: "minutes"}
    assert len(search.tried) < 12 * 20


def test_ctrl_c_leaves_what_was_found():
    prompts = Prompts(interrupt_after=150)
    search = Search(Ledger(SPACE, prompts), BUDGETS, STARTS, 0)
    with pytest.raises(KeyboardInterrupt):
        search.run(Effort(40, 1e9), lambda share, best: None)
    assert THIRD in search.pool
    best = search.ledger.decide(search.pool[THIRD][0])
    assert best < min(map(search.ledger.decide, STARTS[THIRD]))


def test_budgets_are_visited_from_the_loosest_to_the_tightest_and_back():
    visited = []
    search = Search(Ledger(SPACE, Prompts()), BUDGETS, STARTS, 0)
    search.run(Effort(5, 1e9), lambda share, best: visited.append(share))
    assert visited == [THIRD] * 3 + [NINTH] * 5 + [THIRD] * 2
    assert there_and_back([NINTH, THIRD, Fraction(2, 9)]) == [THIRD, Fraction(2, 9), NINTH, Fraction(2, 9), THIRD]


def test_one_budget_starts_from_what_another_found():
    search = Search(Ledger(SPACE, Prompts()), BUDGETS, {THIRD: STARTS[THIRD], NINTH: STARTS[NINTH][:1]}, 0)
    search.run(Effort(1, 1e9), lambda share, best: None)
    assert len(search.tried) > 12 * 2 + len(STARTS[THIRD]) + 1  # children, what was given, and more


def test_the_worst_task_counts():
    values, tasks = np.array([0.1, 0.9, 0.3, 0.5]), ("boxes", "words", "boxes", "words")
    assert task_means(values, tasks) == pytest.approx({"boxes": 0.2, "words": 0.7})
    assert worth(values, tasks, "worst") == pytest.approx(0.7)
    assert worth(values, tasks, "mean") == pytest.approx(0.45)


def test_the_gate_wants_the_whole_interval_below_zero():
    rng = np.random.default_rng(0)
    by_hand = rng.uniform(0.3, 0.5, 128)
    clusters = [str(number // 2) for number in range(128)]
    assert gate(by_hand - 0.1, by_hand, clusters, 0).high < 0
    noisy = gate(by_hand - 0.01 + rng.normal(0, 0.3, 128), by_hand, clusters, 0)
    assert noisy.low < 0 < noisy.high


def test_candidates_read_like_the_tables():
    assert str(Candidate((1, 2, 9), (31, 8, 4), ("delete", "reroute", "delete"))) == "1:31d 2:8 9:4d"


def test_a_difference_without_bounds_is_shown():
    assert shown({"value": -0.5, "low": None, "high": None}) == "-0.5000"
    assert shown({"value": -0.5, "low": -1.0, "high": 0.25}) == "-0.5000 (-1.0000 to +0.2500)"
