"""The pools that a server starts with, and which of them a question goes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from reroute_jax.engine.batching import Layout, Question, lay_out
from reroute_jax.engine.groups import most_rows
from reroute_jax.engine.model import Model
from reroute_jax.engine.questions import question_of
from reroute_jax.errors import RerouteError
from reroute_jax.nn.cache import ROOM
from reroute_jax.routing.plan import Schedule
from reroute_jax.serving.pool import Pool, PoolSize


@dataclass(frozen=True)
class Limits:
    """slots: answers side by side, of each plan and bucket. token_budget: slots at the decoder's input that are
    prefilled at a time. text: buckets for the text tokens of a prompt, ascending. images: of a prompt, at most.
    new_tokens: of an answer, at most."""

    slots: int
    token_budget: int
    text: tuple[int, ...]
    images: int
    new_tokens: int


class Unplaced(RerouteError):
    """A question that is larger than the server was started for."""


@dataclass(frozen=True)
class Pools:
    """All pools of a server. A question without an image has nothing to route: it goes to those of `unrouted`."""

    model: Model
    limits: Limits
    all: tuple[Pool, ...]

    def place(self, question: Question, schedule: Schedule) -> tuple[Pool, Layout]:
        """Raises Unplaced for a question that no pool holds."""
        limits, schedule = self.limits, schedule if question.grids else unrouted(self.model)
        layout = lay_out(question, self.model.config, schedule)
        if len(question.grids) > limits.images:
            raise Unplaced(f"the prompt has {len(question.grids)} images, this server takes up to {limits.images}")
        text = int((~layout.routed).sum())
        if text > limits.text[-1]:
            raise Unplaced(f"the prompt has {text} text tokens, this server takes up to {limits.text[-1]}")
        holding = [pool for pool in self.all if pool.holds(layout, schedule)]
        if not holding:
            sizes = " and ".join(f"{rows} x {columns}" for rows, columns in question.grids)
            raise Unplaced(f"the images have {sizes} visual tokens, for which this server has no bucket: resize them")
        return min(holding, key=lambda pool: pool.shape.text), layout


def unrouted(model: Model) -> Schedule:
    return Schedule.from_decisions((), (), model.config.num_layers)


def make_pools(
    model: Model, schedules: Sequence[Schedule], limits: Limits, made: Callable[[Pool], None] = lambda pool: None
) -> Pools:
    """Allocate all pools and compile all that will run. made: is told of each.

    Raises RerouteError for limits that hold no prompt, and for a schedule of another depth.
    """
    pools = []
    for images in range(limits.images + 1):
        question = _example(model, images)
        for schedule in dict.fromkeys(schedules) if images else [unrouted(model)]:
            layout = lay_out(question, model.config, schedule)
            for text in limits.text:
                pools.append(_pool(model, schedule, layout, text, limits))
                made(pools[-1])
    return Pools(model, limits, tuple(pools))


def pool_count(schedules: Sequence[Schedule], limits: Limits) -> int:
    """Of `make_pools`."""
    return len(limits.text) * (1 + limits.images * len(set(schedules)))


def _example(model: Model, images: int) -> Question:
    """The shortest question with so many images of the family's typical kind."""
    blank = Image.new("RGB", (64, 64))
    return question_of([("user", [*[blank] * images, "a"])], model.files)


def _pool(model: Model, schedule: Schedule, layout: Layout, text: int, limits: Limits) -> Pool:
    shape = replace(layout.shape, text=text)
    if int((~layout.routed).sum()) > text:
        raise RerouteError(f"--max-text {text} holds no prompt: the chat template alone takes more, raise it")
    rows = most_rows(shape, limits.slots, limits.token_budget)
    size = PoolSize(limits.slots, rows, max(ROOM, limits.new_tokens))
    return Pool(model.module, model.files, schedule, layout, shape, size)
