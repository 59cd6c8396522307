"""A model that plans and counts, and prompts whose divergence is a schedule's distance from one that is best."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import numpy as np

from evals.searching.candidates import Budget, Space, spending
from reroute_jax.models import FAMILIES
from reroute_jax.routing.cost import Account, account, visual_per_layer
from reroute_jax.routing.plan import Schedule
from tests.evals.stub import StubModel

SPACE = Space(num_layers=12, visual=64)
BEST = (64, 20, 20, 20, 20, 20, 4, 4, 4, 4, 4, 4)  # how tokens are to be spread over the layers
CHUNK, CHUNKS = 32, 3


class Planner(StubModel):
    reference_grid = (8, 8)

    def cost(self, schedule: Schedule, *, text: int) -> Account:
        sizes = {"visual": 64, "grid": (8, 8), "text": text, "tower": FAMILIES["llava"].tower_sizes(self.config)}
        return account(schedule, self.config.decoder, **sizes, dtype=self.dtype)


def budget(share: Fraction, constraint: str = "tokens") -> Budget:
    return Budget(share, spending(Planner(), SPACE, constraint, text=16))


class Prompts:
    """interrupt_after: schedules until Ctrl-C."""

    def __init__(self, interrupt_after: int | None = None, tasks=("refcoco",)) -> None:
        question = SimpleNamespace(ids=np.zeros(80, int), grids=((8, 8),))
        self.counted = (np.ones(CHUNK, int),) * CHUNKS
        self.asked = tuple(
            SimpleNamespace(question=question, task=tasks[number % len(tasks)], cluster=str(number // 2))
            for number in range(CHUNK * CHUNKS)
        )
        self.tasks = tuple(one.task for one in self.asked)
        self.asked_for: list[tuple[str, int, int | None]] = []
        self._left = interrupt_after

    def divergences(self, schedule: Schedule, first: int = 0, last: int | None = None) -> np.ndarray:
        self.asked_for.append((schedule.label, first, last))
        if self._left is not None:
            if self._left == 0:
                self._left = None  # as a person, who presses it once
                raise KeyboardInterrupt
            self._left -= 1
        layers = np.array(visual_per_layer(schedule, 64))
        away = np.abs(layers / layers.sum() - np.array(BEST) / sum(BEST)).sum() / 2
        each = np.linspace(0.9, 1.1, CHUNK * CHUNKS)
        return away * each[slice(CHUNK * first, None if last is None else CHUNK * last)]
