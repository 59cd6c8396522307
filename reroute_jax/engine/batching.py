"""From questions to the padded arrays of a `Prompt`, on the host.

A question is tokenised and its images are resized once, whatever schedules it is asked under. A schedule lays it out:
which slots it needs, at which positions. A batch holds questions whose layouts have one shape: a bucket for text, and
one for visual tokens. Shapes then come from short ladders, and a program is compiled once for each.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from reroute_jax.buckets import TEXT_BUCKETS, bucket
from reroute_jax.config import ModelConfig
from reroute_jax.decoder import Prompt
from reroute_jax.engine.smaller_images import packed, smaller_positions
from reroute_jax.errors import RerouteError
from reroute_jax.models import FAMILIES
from reroute_jax.routing.downsample import Downsample
from reroute_jax.routing.merge import Merge, merge_arrays
from reroute_jax.routing.plan import Schedule, floors
from reroute_jax.routing.prior import prior_scores
from reroute_jax.routing.static_plan import RoutingPlan
from reroute_jax.types import AnyArray, Grid


@dataclass(frozen=True)
class Question:
    """A prompt that can be asked under any schedule.

    ids: `[S]`, every image as its full number of placeholder tokens. grids: (rows, columns) of its images in order.
    images: as the family's `fit` gives them, 8 bits a value, since many questions may wait; empty where a batch gets
    its pixels apart. folder: of the checkpoint whose tokenizer and image processor made it, where they did.
    """

    ids: np.ndarray
    grids: tuple[Grid, ...] = ()
    images: tuple[UInt8[np.ndarray, "_ _ 3"], ...] = ()
    folder: Path | None = None


@dataclass(frozen=True)
class BatchShape:
    """What programs are compiled for, the number of rows excepted.

    text, routed: slots of a row, for tokens that decisions do not and do choose among. visual: for original visual
    tokens; image: for the features of one image; images: of a row. windows: of an image in the tower, 0 where it has
    none.
    """

    text: int
    routed: int
    visual: int
    image: int
    images: int
    windows: int = 0

    @property
    def slots(self) -> int:
        """Of a row at the decoder's input."""
        return self.text + self.routed


@dataclass(frozen=True)
class Layout:
    """A question's slots after a merge. image, within: of which image, and which of its tokens, -1 and 0 for text.
    routed: the tokens that decisions choose among. visual_positions: of all original visual tokens. floor: by decision,
    of the original tokens of the images that are routed, those that must be kept."""

    question: Question
    ids: Int[np.ndarray, " S"]
    positions: Int[np.ndarray, "*channels S"]
    image: Int[np.ndarray, " S"]
    within: Int[np.ndarray, " S"]
    routed: Bool[np.ndarray, " S"]
    visual_positions: Int[np.ndarray, "*channels n"]
    next_position: int
    floor: Bool[np.ndarray, "W routable"]
    shape: BatchShape

    @property
    def visual(self) -> int:
        """Visual tokens at the decoder's input, those that decisions leave alone included."""
        return int((self.image >= 0).sum())


@jax.tree_util.register_dataclass
@dataclass
class Images:
    """A batch's images for the encoder. pixels: as the family packs them, row after row, every row padded to as many
    images. first: index of each image's first token among its row's original visual tokens. merge: static."""

    pixels: Any
    arrays: dict[str, AnyArray]
    first: Int[AnyArray, "B images"]
    merge: Merge | None = field(metadata={"static": True})


@dataclass(frozen=True)
class Batch:
    """schedule: that the rows are laid out for; plan: what is static of it, for these shapes. images: None where no row
    has one, and where they are not to be encoded. seen: tokens of each row's prompt. live: rows that hold a question;
    the others fill the batch up."""

    layouts: tuple[Layout, ...]
    schedule: Schedule
    prompt: Prompt
    plan: RoutingPlan
    images: Images | None
    seen: Bool[np.ndarray, "B vocab"]
    live: Bool[np.ndarray, " B"]


def lay_out(question: Question, config: ModelConfig, schedule: Schedule) -> Layout:
    """Each image's run of placeholder tokens shrinks to as many slots as the schedule's merge leaves of it.

    Raises RerouteError for a prompt that is too long, and for a floor that holds more tokens than a decision keeps.
    """
    is_image = question.ids == config.image_token
    positions, next_position = FAMILIES[config.family].positions(question.ids, question.grids, config)
    sizes = np.array([rows * cols for rows, cols in question.grids], int)
    left = np.array([schedule.merged_count(rows * cols, (rows, cols)) for rows, cols in question.grids], int)
    image, within = np.full(len(question.ids), -1), np.zeros(len(question.ids), int)
    image[is_image] = np.repeat(np.arange(len(sizes)), sizes)
    within[is_image] = np.concatenate([np.arange(size) for size in sizes] or [[]])
    keep = ~is_image
    keep[is_image] = within[is_image] < left[image[is_image]]
    routed = image == 0 if schedule.first_image_only else is_image
    kept_positions, visual_positions = positions[..., keep], positions[..., is_image]
    if schedule.renumbers_input:
        if positions.ndim > 1:
            raise RerouteError("position_mode='renumber' has no meaning for positions of three channels: leave it out")
        kept_positions, next_position = np.arange(keep.sum()), int(keep.sum())
    elif isinstance(schedule.merge, Downsample) and positions.ndim > 1 and question.grids:
        given = question.ids[keep], question.grids, visual_positions, config
        kept_positions, visual_positions, next_position = smaller_positions(schedule.merge, *given)
    return Layout(
        question,
        question.ids[keep],
        kept_positions,
        image[keep],
        within[keep],
        routed[keep],
        visual_positions,
        next_position,
        _floor(question, positions[..., is_image], config, schedule),
        _shape(question, routed[keep], config, schedule),
    )


def _floor(question: Question, positions: np.ndarray, config: ModelConfig, schedule: Schedule) -> np.ndarray:
    grids = question.grids[:1] if schedule.first_image_only else question.grids
    visual = sum(rows * cols for rows, cols in grids)
    return floors(schedule, grids, np.atleast_2d(positions[..., :visual]), config.decoder)


def _shape(question: Question, routed: Bool[np.ndarray, " S"], config: ModelConfig, schedule: Schedule) -> BatchShape:
    family, merge = FAMILIES[config.family], schedule.merge
    token_bucket, sizes = family.token_bucket, [rows * cols for rows, cols in question.grids]
    text = bucket(int((~routed).sum()), TEXT_BUCKETS, "a prompt, in text tokens,")
    if not sizes:
        # One slot, which nothing reads, and no decision.
        return BatchShape(text, routed=0, visual=1, image=0, images=0)
    image = token_bucket(max(sizes))
    encoded = [merge.cells(grid) for grid in question.grids] if isinstance(merge, Downsample) else question.grids
    largest_encoded = token_bucket(max(rows * cols for rows, cols in encoded))
    return BatchShape(
        text,
        routed=token_bucket(int(routed.sum())),
        visual=token_bucket(sum(sizes)),
        image=image if merge is None else merge.cap(image),
        images=len(sizes),
        windows=family.windows(encoded, largest_encoded, config),
    )


def largest(shapes: Sequence[BatchShape]) -> BatchShape:
    """That holds rows of all of these shapes."""
    names = ("text", "routed", "visual", "image", "images", "windows")
    return BatchShape(*(max(getattr(shape, name) for shape in shapes) for name in names))


def make_batch(
    layouts: Sequence[Layout],
    config: ModelConfig,
    schedule: Schedule,
    *,
    size: int | None = None,
    pixels: np.ndarray | None = None,
    shape: BatchShape | None = None,
    encodes: bool = True,
) -> Batch:
    """The arrays of a batch, filled up to `size` rows. pixels: of all images as the image processor gives them.
    shape: one that holds all rows, None for the smallest. encodes: False leaves out the images.

    Raises RerouteError for a schedule of another depth, and for one that decides too early for `deepstack="late"`.
    """
    schedule.check_depth(config.num_layers)
    schedule.check_deepstack(config.decoder.deepstack)
    filler = lay_out(Question(np.array([config.pad_token])), config, schedule)
    filled = (size or len(layouts)) - len(layouts)
    shape = shape or largest([one.shape for one in layouts])
    scheduled = schedule if shape.routed else Schedule.from_decisions((), (), config.num_layers)
    rows = [*layouts, *[filler] * filled]
    return Batch(
        layouts=tuple(layouts),
        schedule=schedule,
        prompt=_prompt(rows, shape, scheduled),
        plan=scheduled.resolve(shape.routed),
        images=_images(rows, shape.images, config, schedule, pixels) if shape.images and encodes else None,
        seen=_seen(rows, config.decoder.vocab_size),
        live=np.arange(len(rows)) < len(layouts),
    )


def _prompt(rows: Sequence[Layout], shape: BatchShape, schedule: Schedule) -> Prompt:
    batch, slots, channels = len(rows), shape.slots, rows[0].positions.shape[:-1]
    ids, positions = np.zeros((batch, slots), np.int32), np.zeros((*channels, batch, slots), np.int32)
    valid, routed = np.zeros((batch, slots), bool), np.zeros((batch, slots), bool)
    feature = np.full((batch, slots), -1, np.int32)
    visual_positions = np.zeros((*channels, batch, shape.visual), np.int32)
    routed_counts = [int(row.routed.sum()) for row in rows]
    for b, row in enumerate(rows):
        filled = slice(0, len(row.ids))
        ids[b, filled], positions[..., b, filled], routed[b, filled] = row.ids, row.positions, row.routed
        valid[b, filled] = True
        feature[b, filled] = np.where(row.image >= 0, row.image * shape.image + row.within, -1)
        visual_positions[..., b, : row.visual_positions.shape[-1]] = row.visual_positions
    return Prompt(
        ids=ids,
        positions=positions,
        valid=valid,
        feature=feature,
        routed=routed,
        visual_positions=visual_positions,
        keep=schedule.keep_counts(routed_counts),
        seeds=schedule.seed_counts(routed_counts),
        prior=priors(schedule, rows, shape.visual),
        floor=_floors(rows, schedule, shape.visual),
        next_position=np.array([row.next_position for row in rows], np.int32),
        text_slots=shape.text,
    )


def priors(schedule: Schedule, rows: Sequence[Layout], visual: int) -> Float[np.ndarray, "P B visual"]:
    """Host-made scores of the rows' original visual tokens, by decision; no decisions where the schedule has none."""
    if schedule.prior is None:
        return np.zeros((0, len(rows), visual), np.float32)
    prior = np.zeros((len(schedule.decisions), len(rows), visual), np.float32)
    for b, row in enumerate(rows):
        grids = row.question.grids[:1] if schedule.first_image_only else row.question.grids
        if grids:
            # A row's own bytes seed its draw, so that it does not depend on the batch.
            row_seed = zlib.crc32(np.ascontiguousarray(row.question.ids, dtype=np.int64).tobytes())
            prior[:, b, : sum(r * c for r, c in grids)] = prior_scores(schedule, grids, row_seed)
    return prior


def _floors(rows: Sequence[Layout], schedule: Schedule, visual: int) -> Bool[np.ndarray, "W B visual"]:
    decisions = len(schedule.decisions) if schedule.has_floor else 0
    floor = np.zeros((decisions, len(rows), visual), bool)
    for b, row in enumerate(rows):
        if decisions:
            floor[:, b, : row.floor.shape[1]] = row.floor
    return floor


def _images(rows: Sequence[Layout], images: int, config: ModelConfig, schedule: Schedule, pixels) -> Images:
    """images: of a row; those with fewer are filled up."""
    family, slots, first = FAMILIES[config.family], [], np.zeros((len(rows), images), np.int32)
    grids = [grid for row in rows for grid in row.question.grids]
    for b, row in enumerate(rows):
        sizes = [height * width for height, width in row.question.grids]
        slots += range(b * images, b * images + len(sizes))
        first[b, : len(sizes)] = np.cumsum([0, *sizes])[:-1]
    tokens = family.token_bucket(max(height * width for height, width in grids))
    arrays = merge_arrays(schedule.merge, grids, first.size, tokens)
    made = packed(schedule.merge, pixels, grids, config, first.size), arrays
    if slots != list(range(len(slots))):
        order = np.full(first.size, len(slots))  # the first image of padding, where nothing else stands
        order[slots] = np.arange(len(slots))
        made = jax.tree.map(lambda array: array[order], made)
    return Images(*made, first, schedule.merge)


def _seen(rows: Sequence[Layout], vocab: int) -> Bool[np.ndarray, "B vocab"]:
    seen = np.zeros((len(rows), vocab), bool)
    for of_row, row in zip(seen, rows, strict=True):
        of_row[row.question.ids] = True
    return seen
