"""Schedules as a search changes them: whole tokens of the reference image at each decision, and what becomes of the
others. Host code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from itertools import pairwise

import numpy as np

from reroute_jax.engine.model import Model
from reroute_jax.errors import RerouteError
from reroute_jax.routing.merge import Merge
from reroute_jax.routing.plan import Schedule
from reroute_jax.serving.plans import plan_words
from reroute_jax.types import Grid

ACTIONS = ("delete", "reroute")
CONSTRAINTS = ("tokens", "macs", "kv")
MOST_MOVES = 3  # of one child
REDRAWS = 50  # tries at a child that nothing was tried like


@dataclass(frozen=True)
class Candidate:
    """Decisions by layer, ascending. keep: tokens of the reference image. The last action means nothing."""

    layers: tuple[int, ...]
    keep: tuple[int, ...]
    actions: tuple[str, ...]

    def __str__(self) -> str:
        """As `1:31d 2:8 9:4`: layer, tokens, d for deleting the others."""
        told = zip(self.layers, self.keep, self.actions, strict=True)
        return " ".join(f"{layer}:{keep}{'d' * (action == 'delete')}" for layer, keep, action in told)

    @classmethod
    def parsed(cls, text: str) -> Candidate:
        """What `str` gave."""
        parts = [part.removesuffix("d").split(":") for part in text.split()]
        actions = ("delete" if part.endswith("d") else "reroute" for part in text.split())
        return cls(*(tuple(int(part[at]) for part in parts) for at in (0, 1)), tuple(actions))


@dataclass(frozen=True)
class Space:
    """What candidates are of: a decoder of so many layers, and a reference image of `visual` tokens; behind a merge
    those that it leaves of the `image` tokens that there were."""

    num_layers: int
    visual: int
    merge: Merge | None = None
    image: int | None = None

    @classmethod
    def of(cls, model: Model, merge: Merge | None) -> Space:
        """Of the model and its reference image."""
        layers, (rows, cols) = model.config.num_layers, model.reference_grid
        return cls(layers, rows * cols) if merge is None else cls.behind(merge, layers, (rows, cols))

    @classmethod
    def behind(cls, merge: Merge, num_layers: int, grid: Grid) -> Space:
        """Of a reference image of (rows, cols) tokens."""
        image = grid[0] * grid[1]
        return cls(num_layers, merge.anchors(image, grid), merge, image)

    @property
    def token_layers(self) -> int:
        """Visual tokens over all layers where all of the image's run everywhere."""
        return self.num_layers * (self.visual if self.image is None else self.image)

    def schedule(self, candidate: Candidate, label: str = "") -> Schedule:
        """Keep counts become shares of an image's tokens."""
        keep = [Fraction(count, self.visual) for count in candidate.keep]
        return Schedule.from_decisions(
            candidate.layers,
            keep,
            self.num_layers,
            action=candidate.actions,
            merge=self.merge,
            label=label or str(candidate),
        )

    def candidate(self, schedule: Schedule) -> Candidate:
        """That keeps of the reference image what the schedule does."""
        stages = schedule.decisions
        keep = schedule.keep_counts([self.visual])[:, 0].tolist()
        return plain(Candidate(tuple(s.lo for s in stages), tuple(keep), tuple(s.action for s in stages)))


@dataclass(frozen=True)
class Budget:
    """What a schedule may spend. share: of what all tokens cost, by `spent`."""

    share: Fraction
    spent: Callable[[Candidate], Fraction]

    def holds(self, candidate: Candidate) -> bool:
        return self.spent(candidate) <= self.share


def merge_of(model: Model, text: str) -> Merge:
    """METHOD:SHARE, such as divprune:1/2, of a reduction before the decoder. Raises RerouteError for anything else."""
    method, budget, action = plan_words(text)
    schedule = model.plan(method, budget=budget)
    if action is not None or schedule.merge is None or schedule.decisions:
        raise RerouteError(f"{text} is no reduction before the decoder alone: give one such as divprune:1/2")
    return schedule.merge


def spending(model: Model, space: Space, constraint: str, text: int) -> Callable[[Candidate], Fraction]:
    """Candidate -> its share of what all tokens of the reference image cost: "tokens", visual tokens over all layers;
    "macs", multiply-accumulates of the whole prefill with scoring and merging; "kv", bytes of keys and values, text
    included. text: tokens of the prompt beside the image's."""

    def tokens(candidate: Candidate) -> Fraction:
        edges = [*candidate.layers, space.num_layers]
        running = sum(keep * (hi - lo) for keep, (lo, hi) in zip(candidate.keep, pairwise(edges), strict=True))
        return Fraction(edges[0] * space.visual + running, space.token_layers)

    def cost(schedule: Schedule) -> int:
        account = model.cost(schedule, text=text)
        return account.prompt.total() + account.merging if constraint == "macs" else account.kv_bytes

    if constraint == "tokens":
        return tokens
    full = cost(model.plan("none"))
    return lambda candidate: Fraction(cost(space.schedule(candidate)), full)


def plain(candidate: Candidate) -> Candidate:
    """With the last action, which nothing comes after, as the walker has it."""
    return replace(candidate, actions=(*candidate.actions[:-1], "delete")) if candidate.actions else candidate


def repaired(candidate: Candidate, space: Space, budget: Budget) -> Candidate | None:
    """The candidate with all keep counts scaled by one number, so that it spends what the budget holds and no more:
    the largest number by bisection, whole tokens by the largest remainders, none above what deletions left. None
    where a single token a decision is too much."""

    def scaled(factor: float) -> tuple[int, ...]:
        return _capped([max(1, int(factor * count)) for count in candidate.keep], candidate.actions, space.visual)

    @cache  # most of the bisection's numbers are cut to the same counts
    def fits(keep: tuple[int, ...]) -> bool:
        return budget.holds(replace(candidate, keep=keep))

    low, high = 0.0, float(space.visual)
    if not candidate.layers or not fits(scaled(low)):
        return None
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(scaled(middle)) else (low, middle)
    keep = scaled(low)
    remainders = [low * count - int(low * count) for count in candidate.keep]
    order = sorted(range(len(keep)), key=lambda at: -remainders[at])
    while (more := next(_with_one_more(keep, order, candidate.actions, space.visual, fits), None)) is not None:
        keep = more
    return plain(replace(candidate, keep=keep))


def _with_one_more(keep, order: Sequence[int], actions, visual: int, fits) -> Iterator[tuple[int, ...]]:
    for at in order:
        more = (*keep[:at], keep[at] + 1, *keep[at + 1 :])
        if _capped(more, actions, visual) == more and fits(more):
            yield more


def _capped(keep: Sequence[int], actions: Sequence[str], visual: int) -> tuple[int, ...]:
    """No decision keeps more than is left."""
    capped, most = [], visual
    for count, action in zip(keep, actions, strict=True):
        capped.append(min(count, most))
        most = capped[-1] if action == "delete" else most
    return tuple(capped)


def child(parents: Sequence[Candidate], space: Space, budget: Budget, rng: np.random.Generator, tried) -> Candidate:
    """One to three moves away from one of the parents, within the budget, and not among those tried, as far as
    `REDRAWS` tries find such a one; a parent otherwise."""
    for _ in range(REDRAWS):
        moved = parents[int(rng.integers(len(parents)))]
        for _ in range(int(rng.integers(1, MOST_MOVES + 1))):
            moved = MOVES[int(rng.integers(len(MOVES)))](moved, space, rng)
        found = repaired(moved, space, budget)
        if found is not None and found not in tried:
            return found
    return parents[0]


def _shift(candidate: Candidate, space: Space, rng: np.random.Generator) -> Candidate:
    """Token-layers from one stage to another."""
    if len(candidate.layers) < 2:
        return candidate
    giver, taker = rng.choice(len(candidate.layers), size=2, replace=False)
    spans = [hi - lo for lo, hi in pairwise([*candidate.layers, space.num_layers])]
    given = int(rng.integers(1, max(2, candidate.keep[giver] // 2 + 1)))
    taken = max(1, round(given * spans[giver] / spans[taker]))
    keep = list(candidate.keep)
    keep[giver], keep[taker] = max(1, keep[giver] - given), min(space.visual, keep[taker] + taken)
    return replace(candidate, keep=tuple(keep))


def _scale(candidate: Candidate, space: Space, rng: np.random.Generator) -> Candidate:
    at, factor = int(rng.integers(len(candidate.keep))), float(np.exp(rng.uniform(-0.7, 0.7)))
    count = candidate.keep[at]
    scaled = round(factor * count)
    if scaled == count:
        scaled += 1 if factor > 1 else -1
    return _with_keep(candidate, at, min(space.visual, max(1, scaled)))


def _add(candidate: Candidate, space: Space, rng: np.random.Generator) -> Candidate:
    """One more decision, that does what the one before it does."""
    free = [layer for layer in range(space.num_layers) if layer not in candidate.layers]
    if not free:
        return candidate
    layer = free[int(rng.integers(len(free)))]
    at = sum(other < layer for other in candidate.layers)
    like = max(0, at - 1)
    parts = ((candidate.layers, layer), (candidate.keep, candidate.keep[like]))
    layers, keep = ((*old[:at], new, *old[at:]) for old, new in parts)
    action = ACTIONS[int(rng.integers(len(ACTIONS)))]
    return Candidate(layers, keep, (*candidate.actions[:at], action, *candidate.actions[at:]))


def _drop(candidate: Candidate, space: Space, rng: np.random.Generator) -> Candidate:
    if len(candidate.layers) < 2:
        return candidate
    at = int(rng.integers(len(candidate.layers)))
    parts = (candidate.layers, candidate.keep, candidate.actions)
    return Candidate(*((*part[:at], *part[at + 1 :]) for part in parts))


def _move(candidate: Candidate, space: Space, rng: np.random.Generator) -> Candidate:
    """One decision to another layer between its neighbours."""
    edges = [-1, *candidate.layers, space.num_layers]
    at = int(rng.integers(len(candidate.layers)))
    free = [layer for layer in range(edges[at] + 1, edges[at + 2]) if layer != candidate.layers[at]]
    if not free:
        return candidate
    layer = free[int(rng.integers(len(free)))]
    return replace(candidate, layers=(*candidate.layers[:at], layer, *candidate.layers[at + 1 :]))


def _flip(candidate: Candidate, space: Space, rng: np.random.Generator) -> Candidate:
    at = int(rng.integers(len(candidate.actions)))
    actions = [_other(action) if number == at else action for number, action in enumerate(candidate.actions)]
    return replace(candidate, actions=tuple(actions))


def _flip_all(candidate: Candidate, space: Space, rng: np.random.Generator) -> Candidate:
    return replace(candidate, actions=tuple(map(_other, candidate.actions)))


def _other(action: str) -> str:
    return "reroute" if action == "delete" else "delete"


def _with_keep(candidate: Candidate, at: int, count: int) -> Candidate:
    return replace(candidate, keep=(*candidate.keep[:at], count, *candidate.keep[at + 1 :]))


MOVES = (_shift, _scale, _add, _drop, _move, _flip, _flip_all)


# --- Where a search starts --------------------------------------------------------------------------------------------

# What people set by hand.
HAND_SET = {
    "fastv delete": {"method": "fastv", "action": "delete"},
    "fastv reroute": {"method": "fastv", "action": "reroute"},
    "pdrop delete": {"method": "pdrop", "action": "delete"},
    "pdrop reroute": {"method": "pdrop", "action": "reroute"},
    "every delete": {"method": "fastv", "action": "delete", "decisions": "every"},
    "every reroute": {"method": "fastv", "action": "reroute", "decisions": "every"},
    "every:2 reroute": {"method": "fastv", "action": "reroute", "decisions": "every:2"},
}
# And nobody sets at layer 0.
MOVED = ("fastv delete", "fastv reroute", "pdrop delete", "pdrop reroute", "every reroute")
LEAST = Candidate((0,), (1,), ("delete",))


def starting(model: Model, space: Space, budget: Budget, by_hand: Sequence[Candidate]) -> list[Candidate]:
    """Where a search starts: what is set by hand, and the same shapes from layer 0 on. Where nothing that is set by
    hand fits the budget, because all layers before a first decision run all tokens, from layer 1 on as well.

    Raises RerouteError for a budget that not even one token in every layer fits.
    """
    if not budget.holds(LEAST):
        raise RerouteError(
            f"one visual token in every layer spends {float(budget.spent(LEAST)):.3g} of what all tokens spend, more "
            f"than the budget of {budget.share}: raise --budget"
        )
    found = list(by_hand)
    for first in (0,) if by_hand else (0, 1):
        routes = {name: {**HAND_SET[name], "first_decision": first} for name in MOVED}
        found += fitted(model, routes, space, budget)
    return found


def fitted(model: Model, routes: dict[str, dict[str, str]], space: Space, budget: Budget) -> list[Candidate]:
    """The schedules of those routes that this budget is in reach of, each once, with counts that spend it."""
    share, found = min(Fraction(1), budget.share * space.token_layers / (space.num_layers * space.visual)), []
    for route in routes.values():
        try:
            schedule = model.plan(budget=share, **route)
        except RerouteError:
            continue
        found.append(repaired(space.candidate(schedule), space, budget))
    return list(dict.fromkeys(one for one in found if one is not None))
