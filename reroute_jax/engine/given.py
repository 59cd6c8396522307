"""Prompts that come as arrays, as the HF processor returns them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reroute_jax.config import ModelConfig
from reroute_jax.engine.batching import Batch, Question, lay_out, make_batch
from reroute_jax.engine.side_files import SideFiles
from reroute_jax.errors import RerouteError, named
from reroute_jax.models import FAMILIES
from reroute_jax.routing.plan import Schedule
from reroute_jax.types import Grid


def batch_given(
    config: ModelConfig, schedule: Schedule, input_ids, attention_mask, pixel_values, image_grid_thw
) -> Batch:
    """The batch of `Model.inputs`, which explains the arguments."""
    if pixel_values is not None and not np.isfinite(np.asarray(pixel_values, np.float32)).all():
        raise RerouteError("pixel_values are not finite numbers: give them as the HF processor makes them")
    grids = FAMILIES[config.family].image_grids(pixel_values, image_grid_thw, config)
    layouts = []
    for number, row in enumerate(questions(valid_rows(input_ids, attention_mask), grids, config)):
        with named(f"row {number}"):
            layouts.append(lay_out(row, config, schedule))
    return make_batch(layouts, config, schedule, pixels=pixel_values)


def images_given(batch: Batch, pixel_values, files: SideFiles) -> list[np.ndarray]:
    """uint8 `[h, w, 3]` of every image whose normalised pixels a batch was made of.

    Raises RerouteError where the checkpoint lacks its image processor.
    """
    grids = [grid for layout in batch.layouts for grid in layout.question.grids]
    if not grids:
        return []
    processor = files.image_processor
    mean, deviation = np.array(processor.image_mean), np.array(processor.image_std)
    images = files.family.unpack(pixel_values, grids, files.config)
    return [np.rint(255 * np.clip(image * deviation + mean, 0, 1)).astype(np.uint8) for image in images]


def valid_rows(input_ids, attention_mask) -> list[np.ndarray]:
    """The ids of each row without padding, which may stand on either side.

    Raises RerouteError for ids that are not `[B, S]`, a mask of another shape or of other numbers than 0 and 1, and
    rows with nothing in them.
    """
    ids = _array("input_ids", input_ids)
    mask = np.ones(ids.shape, bool) if attention_mask is None else _array("attention_mask", attention_mask)
    if ids.ndim != 2 or mask.shape != ids.shape:
        raise RerouteError(
            f"input_ids have shape {list(ids.shape)} and attention_mask {list(mask.shape)}: expected the same [B, S]"
        )
    if not len(ids):
        raise RerouteError("input_ids have no row: expected at least one prompt")
    if not np.isin(mask, (0, 1)).all():
        raise RerouteError("attention_mask is not all 1 (a token) and 0 (padding): give that of the HF tokenizer")
    rows = [row[keep.astype(bool)] for row, keep in zip(ids, mask, strict=True)]
    for number, row in enumerate(rows):
        if not len(row):
            raise RerouteError(f"row {number} of input_ids is all padding: expected at least one token")
    return rows


def _array(name: str, given) -> np.ndarray:
    try:
        return np.asarray(given)
    except ValueError:
        raise RerouteError(f"{name} has rows of several lengths: pad them, and give attention_mask") from None


def check_ids(ids: np.ndarray, config: ModelConfig, where: str) -> None:
    """Raises RerouteError for an id that the embedding table lacks, and for a video's. where: the prompt, for the
    message."""
    if not np.issubdtype(ids.dtype, np.integer):
        raise RerouteError(f"{where} has ids of dtype {ids.dtype}, expected integers")
    outside = ids[(ids < 0) | (ids >= config.decoder.vocab_size)]
    if len(outside):
        raise RerouteError(f"{where} has id {outside[0]}, expected 0 to {config.decoder.vocab_size - 1}")
    if config.video_token is not None and config.video_token in ids:
        raise RerouteError(f"{where} has video tokens: videos are not supported, give still images")


def questions(ids: Sequence[np.ndarray], grids: Sequence[Grid], config: ModelConfig) -> list[Question]:
    """The rows with their images, which stand in `grids` in order of appearance.

    Raises RerouteError for ids out of range, and where image tokens and images do not fit.
    """
    rows, used = [], 0
    for number, row in enumerate(ids):
        check_ids(row, config, f"row {number}")
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
        rows.append(Question(row, tuple(grids[first:used])))
    if used < len(grids):
        raise RerouteError(f"there are {len(grids)} images and the prompts have places for {used}: leave out the rest")
    return rows
