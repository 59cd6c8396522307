"""The pools that a server starts with, and which of them a question goes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from reroute_jax.engine.batching import BatchShape, Layout, Question, lay_out
from reroute_jax.engine.groups import most_rows
from reroute_jax.engine.image_cache import CachedPrefill, ImageCache, prefix_length
from reroute_jax.engine.model import Model
from reroute_jax.engine.questions import question_of
from reroute_jax.errors import RerouteError
from reroute_jax.nn.cache import ROOM
from reroute_jax.routing.plan import Schedule
from reroute_jax.serving.pool import Pool, PoolSize
from reroute_jax.types import Size


@dataclass(frozen=True)
class Limits:
    """slots: answers side by side, of each plan and bucket. token_budget: slots at the decoder's input that are
    prefilled at a time. text: buckets for the text tokens of a prompt, ascending. images: of a prompt, at most.
    image_sizes: examples of images, for families that see each in its own size. new_tokens: of an answer, at most.
    image_cache: bytes of device memory, and of the host's, for images that are asked about again, 0 for none."""

    slots: int
    token_budget: int
    text: tuple[int, ...]
    images: int
    image_sizes: tuple[Size, ...]
    new_tokens: int
    image_cache: int = 0


@dataclass(frozen=True)
class Kind:
    """Questions that share a pool: laid out for `schedule`, like `example` but for the text, for which `shape` has
    room."""

    schedule: Schedule
    example: Layout
    shape: BatchShape


class Unplaced(RerouteError):
    """A question that is larger than the server was started for."""


@dataclass(frozen=True)
class Pools:
    """All pools of a server. A question without an image has nothing to route: it goes to those of `unrouted`."""

    model: Model
    limits: Limits
    all: tuple[Pool, ...]

    def place(self, question: Question, schedule: Schedule) -> tuple[Pool, Layout]:
        """Raises Unplaced for a question that no pool holds, and RerouteError for one that an image cache cannot
        split."""
        limits, schedule = self.limits, schedule if question.grids else unrouted(self.model)
        layout = lay_out(question, self.model.config, schedule)
        if len(question.grids) > limits.images:
            raise Unplaced(f"the prompt has {len(question.grids)} images, this server takes up to {limits.images}")
        text = text_tokens(layout)
        if text > limits.text[-1]:
            raise Unplaced(f"the prompt has {text} text tokens, this server takes up to {limits.text[-1]}")
        holding = [pool for pool in self.all if pool.holds(layout, schedule)]
        if not holding:
            sizes = " and ".join(f"{rows} x {columns}" for rows, columns in question.grids)
            raise Unplaced(
                f"the prompt has images of {sizes} visual tokens, this server was not started for their size"
            )
        if limits.image_cache and question.grids:
            prefix_length(layout)
        return min(holding, key=lambda pool: pool.shape.text), layout


def unrouted(model: Model) -> Schedule:
    return Schedule.from_decisions((), (), model.config.num_layers)


def text_tokens(layout: Layout) -> int:
    return int((~layout.routed).sum())


def kinds(model: Model, schedules: Sequence[Schedule], limits: Limits) -> list[Kind]:
    """One for every schedule, number and size of images, and bucket of text tokens.

    Raises RerouteError for a bucket that holds no prompt, and for a schedule of another depth.
    """
    found: dict[tuple[Schedule, BatchShape], Kind] = {}
    for images in range(limits.images + 1):
        for size in limits.image_sizes:
            question = _example(model, images, size)
            for schedule in schedules if images else [unrouted(model)]:
                layout = lay_out(question, model.config, schedule)
                for text in limits.text:
                    shape = replace(layout.shape, text=text)
                    if text_tokens(layout) > text:
                        raise RerouteError(f"--max-text {text} holds no prompt, the chat template takes more: raise it")
                    found.setdefault((schedule, shape), Kind(schedule, layout, shape))
    return list(found.values())


def make_pool(model: Model, kind: Kind, limits: Limits, cache: ImageCache | None = None) -> Pool:
    """cache: that all pools share, None for none. Raises RerouteError where the token budget holds no prompt, and for a
    schedule that has nothing to keep of an image."""
    rows = most_rows(kind.shape, limits.slots, limits.token_budget)
    size = PoolSize(limits.slots, rows, max(ROOM, limits.new_tokens))
    # In every pool prefixes have room for as much text, so that they fit wherever they are found.
    cached = None if cache is None else CachedPrefill(cache, model.files, limits.text[-1])
    return Pool(model.weights, model.files, kind.schedule, kind.example, kind.shape, size, cached)


def _example(model: Model, images: int, size: Size) -> Question:
    """The shortest question with so many images of this size."""
    blank = Image.new("RGB", size)
    chat = [("user", [*[blank] * images, "a"])]
    return question_of(chat, model.files, text_special_tokens=False)
