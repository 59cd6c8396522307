"""The search: children of the best schedules so far, screened on a few prompts and decided on all of them.

Budgets help each other: a search of one starts from what the others found, fitted to it. So it goes from the loosest to
the tightest and back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from evals.harness.metrics import Interval, Resampler, difference
from evals.searching.calibration import Calibration, task_means
from evals.searching.candidates import Budget, Candidate, Space, child, repaired

OBJECTIVES = ("mean", "worst")
CHILDREN, DECIDED, PARENTS = 12, 5, 4  # of a round
SCREENED = 64  # prompts


@dataclass(frozen=True)
class Effort:
    """Of one budget in one search. rounds: what a search is deterministic by. seconds: after which no round starts."""

    rounds: int
    seconds: float


@dataclass
class Ledger:
    """What schedules are worth on prompts, each computed once. objective: "mean" over prompts, or of the "worst" task.
    screens, whole: divergences by candidate, on the first chunks of prompts and on all of them."""

    space: Space
    calibration: Calibration
    objective: str = "mean"
    screens: dict[Candidate, np.ndarray] = field(default_factory=dict)
    whole: dict[Candidate, np.ndarray] = field(default_factory=dict)

    def screen(self, candidate: Candidate) -> float:
        if candidate not in self.screens:
            schedule = self.space.schedule(candidate)
            self.screens[candidate] = self.calibration.divergences(schedule, 0, self._screening)
        return worth(self.screens[candidate], self.calibration.tasks, self.objective)

    def decide(self, candidate: Candidate) -> float:
        return worth(self.divergences(candidate), self.calibration.tasks, self.objective)

    def divergences(self, candidate: Candidate) -> np.ndarray:
        """Of all prompts."""
        if candidate not in self.whole:
            self.screen(candidate)
            rest = self.calibration.divergences(self.space.schedule(candidate), self._screening)
            self.whole[candidate] = np.concatenate([self.screens[candidate], rest])
        return self.whole[candidate]

    def best(self, candidates: Sequence[Candidate], screened: int, decided: int) -> list[Candidate]:
        """The best `decided` of those that screen as the best `screened`."""
        screens = sorted(dict.fromkeys(candidates), key=self.screen)[:screened]
        return sorted(screens, key=self.decide)[:decided]

    @property
    def _screening(self) -> int:
        """Chunks that hold at least SCREENED prompts."""
        ends = np.cumsum([len(counted) for counted in self.calibration.counted])
        return int(np.searchsorted(ends, SCREENED)) + 1


def worth(values: np.ndarray, tasks: Sequence[str], objective: str) -> float:
    """What a search minimises, of the divergences of prompts of these tasks."""
    return float(values.mean()) if objective == "mean" else max(task_means(values, tasks).values())


@dataclass
class Search:
    """One search with one seed over several budgets. starts: by budget, where it starts. pool: by budget, the best so
    far, best first; stopped: what ended its last visit. tried: candidates of this search."""

    ledger: Ledger
    budgets: Mapping[Fraction, Budget]
    starts: Mapping[Fraction, Sequence[Candidate]]
    seed: int
    pool: dict[Fraction, list[Candidate]] = field(default_factory=dict)
    stopped: dict[Fraction, str] = field(default_factory=dict)
    tried: set[Candidate] = field(default_factory=set)

    def run(self, effort: Effort, told: Callable[[Fraction, float], Any], clock=time.monotonic) -> None:
        """Visit the budgets and fill `pool`. told: of each round its budget and the best objective so far. Ctrl-C, as
        KeyboardInterrupt, leaves the pool as it was after the last whole round."""
        order = there_and_back(self.budgets)
        rng = np.random.default_rng(self.seed)
        for place, share in enumerate(order):
            before = order[:place].count(share)
            visits = order.count(share)
            rounds = effort.rounds // visits + (before < effort.rounds % visits)
            for _ in self._visit(share, rounds, effort.seconds / visits, rng, clock):
                told(share, self.ledger.decide(self.pool[share][0]))

    def _visit(self, share: Fraction, rounds: int, seconds: float, rng: np.random.Generator, clock) -> Iterator[None]:
        """Improve the pool of a budget, a round at a time."""
        end, budget, space = clock() + seconds, self.budgets[share], self.ledger.space
        others = [found for other, pool in self.pool.items() if other != share for found in pool]
        fitted = [found for one in others if (found := repaired(one, space, budget)) is not None]
        known = [*self.pool.get(share, ()), *self.starts[share], *fitted]
        self.tried.update(known)
        parents = self.ledger.best(known, 2 * DECIDED, PARENTS)
        self.pool[share], self.stopped[share] = parents, "rounds"
        for _ in range(rounds):
            if clock() >= end:
                self.stopped[share] = "minutes"
                return
            children: list[Candidate] = []
            for _ in range(CHILDREN):
                children.append(child(parents, space, budget, rng, self.tried))
                self.tried.add(children[-1])
            fresh = sorted(dict.fromkeys(children), key=self.ledger.screen)[:DECIDED]
            parents = sorted(dict.fromkeys([*parents, *fresh]), key=self.ledger.decide)[:PARENTS]
            self.pool[share] = parents
            yield


def there_and_back(shares: Sequence[Fraction]) -> list[Fraction]:
    """From the largest to the smallest and back."""
    falling = sorted(shares, reverse=True)
    return [*falling, *falling[-2::-1]]


def gate(found: np.ndarray, hand_set: np.ndarray, clusters: Sequence[str], seed: int) -> Interval:
    """Divergence of the found schedule minus the hand-set one's on the same fresh prompts. The found one is kept where
    the whole interval is below zero."""
    return difference(found[:, None], hand_set[:, None], Resampler(tuple(clusters), seed))[0]
