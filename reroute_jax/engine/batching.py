"""From token ids to the padded arrays of a `Prompt`, on the host.

Every row of a batch gets the same number of slots: a bucket for its text, and one for its visual tokens. Shapes then
come from short ladders, and a program is compiled once for each.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reroute_jax.buckets import TEXT_BUCKETS, bucket
from reroute_jax.config import ModelConfig
from reroute_jax.decoder import Prompt
from reroute_jax.errors import RerouteError
from reroute_jax.models import FAMILIES
from reroute_jax.routing.plan import RoutingPlan, Schedule
from reroute_jax.routing.prior import prior_scores
from reroute_jax.types import Grid


@dataclass(frozen=True)
class Batch:
    """seen: `[B, vocab]`, tokens of each row's prompt. plan: static, for these shapes."""

    prompt: Prompt
    plan: RoutingPlan
    seen: np.ndarray


@dataclass(frozen=True)
class Row:
    """One prompt: its token ids with every image expanded, and the (rows, columns) of its images in order."""

    ids: np.ndarray
    grids: tuple[Grid, ...]


@dataclass(frozen=True)
class BatchShape:
    """What programs are compiled for, the number of rows excepted.

    text, routed: slots of a row, for tokens that decisions do not and do choose among. visual: for original visual
    tokens; image: for the features of one image; images: of a row.
    """

    text: int
    routed: int
    visual: int
    image: int
    images: int

    @property
    def slots(self) -> int:
        """Of a row at the decoder's input."""
        return self.text + self.routed


def row_shape(row: Row, config: ModelConfig, schedule: Schedule) -> BatchShape:
    """The shape of a batch of rows like this one. Raises RerouteError for a prompt that is too long."""
    return _shape([row], [_lay_out(row, config, schedule)], config, schedule)


def valid_rows(input_ids, attention_mask) -> list[np.ndarray]:
    """The ids of each row without padding, which may stand on either side.

    Raises RerouteError for ids that are not `[B, S]`, a mask of another shape, and rows with nothing in them.
    """
    ids = np.asarray(input_ids)
    mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask)
    if ids.ndim != 2 or mask.shape != ids.shape:
        raise RerouteError(
            f"input_ids have shape {list(ids.shape)} and attention_mask {list(mask.shape)}: expected the same [B, S]"
        )
    rows = [row[keep.astype(bool)] for row, keep in zip(ids, mask, strict=True)]
    for number, row in enumerate(rows):
        if not len(row):
            raise RerouteError(f"row {number} of input_ids is all padding: expected at least one token")
    return rows


def split_images(ids: Sequence[np.ndarray], grids: Sequence[Grid], config: ModelConfig) -> list[Row]:
    """The rows with their images, which stand in `grids` in order of appearance.

    Raises RerouteError where image tokens and images do not fit.
    """
    rows, used = [], 0
    for number, row in enumerate(ids):
        found, needed, first = int((row == config.image_token).sum()), 0, used
        while needed < found and used < len(grids):
            needed += grids[used][0] * grids[used][1]
            used += 1
        if needed < found:
            raise RerouteError(
                f"row {number} has {found} image tokens and the images left for it fill {needed}: give one image for "
                "every placeholder, and one image token for every visual token, as the HF processor does"
            )
        if needed > found:
            raise RerouteError(
                f"row {number} has {found} image tokens and its images have {needed} visual tokens: expand each "
                "placeholder to the visual tokens of its image, as the HF processor does"
            )
        rows.append(Row(row, tuple(grids[first:used])))
    if used < len(grids):
        raise RerouteError(f"there are {len(grids)} images and the prompts have places for {used}: leave out the rest")
    return rows


def make_batch(rows: Sequence[Row], config: ModelConfig, schedule: Schedule) -> Batch:
    """Arrays for rows of token ids in which every image stands as its full number of placeholder tokens."""
    schedule.check_depth(config.num_layers)
    laid = [_lay_out(row, config, schedule) for row in rows]
    original = [[r * c for r, c in row.grids] for row in rows]
    shape = _shape(rows, laid, config, schedule)
    batch, slots, channels = len(rows), shape.slots, laid[0].positions.shape[:-1]
    ids, positions = np.zeros((batch, slots), np.int32), np.zeros((*channels, batch, slots), np.int32)
    valid, feature = np.zeros((batch, slots), bool), np.full((batch, slots), -1, np.int32)
    chosen_among, seen = np.zeros((batch, slots), bool), np.zeros((batch, config.decoder.vocab_size), bool)
    visual_positions = np.zeros((*channels, batch, shape.visual), np.int32)
    first_image = np.cumsum([0, *(len(sizes) for sizes in original)])
    first_feature = np.cumsum([0, *(sum(sizes) for sizes in original)])
    for b, (row, one) in enumerate(zip(rows, laid, strict=True)):
        filled = slice(0, len(one.ids))
        ids[b, filled], positions[..., b, filled], chosen_among[b, filled] = one.ids, one.positions, one.routed
        valid[b, filled] = True
        is_image = one.image >= 0
        feature[b, filled] = np.where(is_image, (first_image[b] + one.image) * shape.image + one.within, -1)
        visual_positions[..., b, : one.visual_positions.shape[-1]] = one.visual_positions
        seen[b, row.ids] = True
    scheduled = schedule if shape.routed else Schedule.from_decisions((), (), config.num_layers)
    prompt = Prompt(
        ids=ids,
        positions=positions,
        valid=valid,
        feature=feature,
        routed=chosen_among,
        first_feature=first_feature[:-1].astype(np.int32),
        visual_positions=visual_positions,
        keep=scheduled.keep_counts([int(one.routed.sum()) for one in laid]),
        prior=_prior(scheduled, rows, shape.visual),
        next_position=np.array([one.next_position for one in laid], np.int32),
        text_slots=shape.text,
    )
    return Batch(prompt, scheduled.resolve(shape.routed), seen)


@dataclass(frozen=True)
class _Layout:
    """A row's slots after a merge. image, within: of which image, and which of its tokens, -1 and 0 for text."""

    ids: np.ndarray
    positions: np.ndarray
    image: np.ndarray
    within: np.ndarray
    routed: np.ndarray
    visual_positions: np.ndarray
    next_position: int


def _lay_out(row: Row, config: ModelConfig, schedule: Schedule) -> _Layout:
    """Each image's run of placeholder tokens shrinks to as many slots as the merge leaves of it."""
    is_image = row.ids == config.image_token
    positions, next_position = FAMILIES[config.family].positions(row.ids, row.grids, config)
    sizes = np.array([rows * cols for rows, cols in row.grids], int)
    left = np.array([schedule.merged_count(rows * cols, (rows, cols)) for rows, cols in row.grids], int)
    image, within = np.full(len(row.ids), -1), np.zeros(len(row.ids), int)
    image[is_image] = np.repeat(np.arange(len(sizes)), sizes)
    within[is_image] = np.concatenate([np.arange(size) for size in sizes] or [[]])
    keep = ~is_image
    keep[is_image] = within[is_image] < left[image[is_image]]
    routed = image == 0 if schedule.first_image_only else is_image
    return _Layout(
        row.ids[keep],
        positions[..., keep],
        image[keep],
        within[keep],
        routed[keep],
        positions[..., is_image],
        next_position,
    )


def _shape(rows: Sequence[Row], laid: Sequence[_Layout], config: ModelConfig, schedule: Schedule) -> BatchShape:
    token_bucket = FAMILIES[config.family].token_bucket
    text = bucket(max(int((~one.routed).sum()) for one in laid), TEXT_BUCKETS, "a prompt, in text tokens,")
    most_routed = max(int(one.routed.sum()) for one in laid)
    routed = token_bucket(most_routed) if most_routed else 0
    sizes = [[r * c for r, c in row.grids] for row in rows]
    # A batch without images has one slot, which nothing reads.
    visual = token_bucket(max(1, *(sum(of_row) for of_row in sizes)))
    largest = max((size for of_row in sizes for size in of_row), default=0)
    image = token_bucket(largest) if largest else 0
    if largest and schedule.merge is not None:
        image = schedule.merge.cap(image)
    return BatchShape(text, routed, visual, image, max(len(of_row) for of_row in sizes))


def _prior(schedule: Schedule, rows: Sequence[Row], visual: int) -> np.ndarray:
    if schedule.prior is None:
        return np.zeros((0, len(rows), visual), np.float32)
    prior = np.zeros((len(schedule.decisions), len(rows), visual), np.float32)
    for b, row in enumerate(rows):
        grids = row.grids[:1] if schedule.first_image_only else row.grids
        if grids:
            # A row's own bytes seed its draw, so that it does not depend on the batch.
            row_seed = zlib.crc32(np.ascontiguousarray(row.ids, dtype=np.int64).tobytes())
            prior[:, b, : sum(r * c for r, c in grids)] = prior_scores(schedule, grids, row_seed)
    return prior
