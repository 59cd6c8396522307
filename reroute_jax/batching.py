"""From token ids to the padded arrays of a `Prompt`, on the host.

Every row of a batch gets the same number of slots: a bucket for its text, and the visual tokens of the row that has
most. Shapes then come from a short ladder, and a program is compiled once for each.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reroute_jax.config import ModelConfig
from reroute_jax.decoder import Prompt
from reroute_jax.errors import RerouteError
from reroute_jax.routing.plan import RoutingPlan, Schedule
from reroute_jax.routing.prior import prior_scores

TEXT_BUCKETS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)


@dataclass(frozen=True)
class Batch:
    """images: of each row. seen: `[B, vocab]`, tokens of each row's prompt. plan: static, for these shapes."""

    prompt: Prompt
    plan: RoutingPlan
    images: tuple[int, ...]
    seen: np.ndarray


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


def text_bucket(longest: int) -> int:
    """The smallest bucket that holds `longest` text tokens."""
    for size in TEXT_BUCKETS:
        if longest <= size:
            return size
    raise RerouteError(f"a prompt has {longest} text tokens: expected at most {TEXT_BUCKETS[-1]}")


def make_batch(rows: Sequence[np.ndarray], config: ModelConfig, schedule: Schedule) -> Batch:
    """Arrays for rows of token ids in which every image stands as its full number of placeholder tokens."""
    schedule.check_depth(config.num_layers)
    grid = config.vision.grid
    patches = grid[0] * grid[1]
    images = [_images(row, number, config.image_token, patches) for number, row in enumerate(rows)]
    merged = schedule.merged_count(patches, grid)
    text = text_bucket(max(len(row) - count * patches for row, count in zip(rows, images, strict=True)))
    most = max(images)
    batch, slots = len(rows), text + most * merged
    ids, positions = np.zeros((batch, slots), np.int32), np.zeros((batch, slots), np.int32)
    valid, feature = np.zeros((batch, slots), bool), np.full((batch, slots), -1, np.int32)
    # Never empty, so that a batch without images runs the same program.
    visual_positions = np.zeros((batch, max(most, 1) * patches), np.int32)
    seen = np.zeros((batch, config.decoder.vocab_size), bool)
    first_image = np.concatenate([[0], np.cumsum(images)[:-1]]).astype(np.int32)
    for b, row in enumerate(rows):
        layout = _layout(row, config.image_token, patches, merged, int(first_image[b]) * merged)
        filled = slice(0, len(layout[0]))
        ids[b, filled], positions[b, filled], feature[b, filled] = layout
        valid[b, filled] = True
        visual_positions[b, : images[b] * patches] = np.flatnonzero(row == config.image_token)
        seen[b, row] = True
    routed = schedule if most else Schedule.from_decisions((), (), config.num_layers)
    prompt = Prompt(
        ids=ids,
        positions=positions,
        valid=valid,
        feature=feature,
        first_feature=first_image * patches,
        visual_positions=visual_positions,
        keep=routed.keep_counts([count * merged for count in images]),
        prior=_prior(routed, rows, images, grid),
        next_position=np.array([len(row) for row in rows], np.int32),
        text_slots=text,
    )
    return Batch(prompt, routed.resolve(most * merged), tuple(images), seen)


def _images(row: np.ndarray, number: int, image_token: int, patches: int) -> int:
    found = int((row == image_token).sum())
    if found % patches:
        raise RerouteError(
            f"row {number} has {found} image tokens: expected a multiple of {patches}, as the HF processor expands them"
        )
    return found // patches


def _layout(row: np.ndarray, image_token: int, patches: int, merged: int, feature: int):
    """(ids, positions, features) of a row's slots: each run of `patches` image tokens shrinks to `merged` slots."""
    is_image = row == image_token
    ordinal = np.cumsum(is_image) - 1
    keep = ~is_image | (ordinal % patches < merged)
    within = feature + ordinal // patches * merged + ordinal % patches
    return row[keep], np.flatnonzero(keep), np.where(is_image, within, -1)[keep]


def _prior(schedule: Schedule, rows, images, grid: tuple[int, int]) -> np.ndarray:
    width = max(1, *images) * grid[0] * grid[1]
    if schedule.prior is None:
        return np.zeros((0, len(rows), width), np.float32)
    prior = np.zeros((len(schedule.decisions), len(rows), width), np.float32)
    for b, (row, count) in enumerate(zip(rows, images, strict=True)):
        if count:
            stacked = (count * grid[0], grid[1])
            size = stacked[0] * stacked[1]
            # A row's own bytes seed its draw, so that it does not depend on the batch.
            row_seed = zlib.crc32(np.ascontiguousarray(row, dtype=np.int64).tobytes())
            prior[:, b, :size] = prior_scores(schedule, size, stacked, row_seed)
    return prior
