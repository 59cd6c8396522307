"""Which questions are answered together, and the batches that they make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeVar

from reroute_jax.engine.batching import Batch, BatchShape, Layout, largest, lay_out, make_batch
from reroute_jax.engine.pipeline import full_groups
from reroute_jax.engine.questions import question_of
from reroute_jax.engine.side_files import SideFiles
from reroute_jax.errors import RerouteError, named
from reroute_jax.routing.plan import Schedule

Item = TypeVar("Item")


@dataclass(frozen=True)
class Group:
    """Questions that are answered together. numbers: theirs in the call."""

    numbers: tuple[int, ...]
    layouts: tuple[Layout, ...]
    batch: Batch


@dataclass(frozen=True)
class Failed:
    """A question that cannot be asked. number: its in the call."""

    number: int
    error: RerouteError


def groups(
    items: Sequence[Any],
    files: SideFiles,
    schedule: Schedule,
    batch_size: int,
    token_budget: int | None = None,
    text_special_tokens: bool = True,
    shards: int = 1,
    encodes: bool = True,
) -> Iterator[Group | Failed]:
    """The batches of `Model.answer`, ready to run: those of a shape in the order of their numbers, what did not fill
    one of its own at the end, and behind it what cannot be asked. shards: as of `padded_rows`. encodes: as of
    `make_batch`.

    Raises RerouteError for a schedule of another depth.
    """
    schedule.check_depth(files.config.num_layers)
    failed: list[Failed] = []

    def most(shape: BatchShape) -> int:
        return most_rows(shape, batch_size, token_budget)

    def laid_out() -> Iterator[tuple[int, Layout]]:
        for number, item in enumerate(items):
            try:
                with named(f"question {number}"):
                    question = question_of(item, files, text_special_tokens=text_special_tokens)
                    layout = lay_out(question, files.config, schedule)
                    most(layout.shape)
            except RerouteError as error:
                failed.append(Failed(number, error))
            else:
                yield number, layout

    def group(members: Sequence[tuple[int, Layout]]) -> Group:
        numbers, layouts = zip(*members, strict=True)
        size = padded_rows(len(layouts), most(largest([one.shape for one in layouts])), shards)
        return Group(numbers, layouts, batch_of(layouts, files, schedule, size, encodes=encodes))

    left = []
    for shape, members in full_groups(laid_out(), lambda one: one[1].shape, most):
        if len(members) == most(shape):
            yield group(members)
        else:
            left += members
    yield from map(group, similar(left, lambda one: one[1].shape, batch_size, token_budget))
    yield from failed


def check_limits(batch_size: Any, token_budget: Any) -> None:
    """Raises RerouteError for a batch size, and for a token budget other than None, that is no whole number from 1
    on."""
    _check_whole("batch_size", batch_size)
    if token_budget is not None:
        _check_whole("token_budget", token_budget)


def _check_whole(name: str, value: Any) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise RerouteError(f"{name} is {value!r}, expected a whole number of at least 1")


def batch_of(
    layouts: Sequence[Layout],
    files: SideFiles,
    schedule: Schedule,
    size: int,
    shape: BatchShape | None = None,
    encodes: bool = True,
) -> Batch:
    """The arrays of questions that hold their images, filled up to `size` rows. shape, encodes: as of `make_batch`."""
    images = [image for one in layouts for image in one.question.images] if encodes else []
    pixels = files.family.pixels(images, files.image_processor)[0] if images else None
    return make_batch(layouts, files.config, schedule, size=size, pixels=pixels, shape=shape, encodes=encodes)


def batches_of_shapes(
    items: Sequence[Any],
    files: SideFiles,
    schedule: Schedule,
    batch_size: int,
    token_budget: int | None,
    shards: int = 1,
    encodes: bool = True,
) -> Iterator[list[Batch]]:
    """For each shape that the items have, a batch of every number of rows that one is filled up to, ascending. encodes:
    as of `make_batch`."""
    layouts: dict[BatchShape, Layout] = {}
    for item in items:
        layout = lay_out(question_of(item, files), files.config, schedule)
        layouts.setdefault(layout.shape, layout)
    for shape, layout in layouts.items():
        most = most_rows(shape, batch_size, token_budget)
        sizes = padded_sizes(most, shards)
        yield [batch_of([layout] * size, files, schedule, size, encodes=encodes) for size in sizes]


def most_rows(shape: BatchShape, batch_size: int, token_budget: int | None) -> int:
    """Rows of this shape that run together. Raises RerouteError where the budget does not hold a single one."""
    rows = _rows_within(shape, batch_size, token_budget)
    if not rows:
        raise RerouteError(
            f"a prompt takes {shape.slots} slots and token_budget is {token_budget}: raise it, or leave it out"
        )
    return rows


def _rows_within(shape: BatchShape, batch_size: int, token_budget: int | None) -> int:
    return batch_size if token_budget is None else min(batch_size, token_budget // shape.slots)


def padded_rows(rows: int, most: int, shards: int = 1) -> int:
    """Rows that a batch of `rows` is filled up to: on each device that rows are split over a power of two, so that few
    sizes are compiled, or its part of `most`."""
    own, limit = -(-rows // shards), -(-most // shards)
    return shards * min(limit, 1 << (own - 1).bit_length())


def padded_sizes(most: int, shards: int = 1) -> list[int]:
    """All that `padded_rows` gives for up to `most` rows, ascending."""
    return sorted({padded_rows(rows, most, shards) for rows in range(1, most + 1)})


def similar(
    items: Sequence[Item], shape: Callable[[Item], BatchShape], batch_size: int, token_budget: int | None
) -> Iterator[list[Item]]:
    """Items that did not fill a batch of their own shape, together with others that have as many images, as far as no
    row gets more than twice the slots it needs."""
    group: list[Item] = []
    for item in sorted(items, key=lambda one: (shape(one).images, -shape(one).slots)):
        joined = largest([shape(one) for one in (*group, item)])
        fits = (
            shape(item).images == joined.images
            and joined.slots <= 2 * shape(item).slots
            and len(group) < _rows_within(joined, batch_size, token_budget)
        )
        if group and not fits:
            yield group
            group = []
        group.append(item)
    if group:
        yield group
