"""Host packing of Qwen2.5-VL's images: padding to buckets, patch coordinates, attention windows (numpy).

Patches keep the order of the image processor: merge blocks in raster order, `merge^2` patches each in raster order.
Sizes below are in merged tokens unless they say patches. Letters: I images, n merged tokens, P = merge^2 * n patches,
W windows, S patches a window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float, Int

from reroute_jax.buckets import VISUAL_BUCKETS, bucket
from reroute_jax.errors import RerouteError
from reroute_jax.types import AnyArray
from reroute_jax.vision.qwen_config import QwenVisionConfig

# Up to this aspect ratio images share one number of windows, 1.25 times what a square image has at 576 tokens; the
# worst case, a single row, has four times as many.
ORDINARY_ASPECT = 4


@jax.tree_util.register_dataclass
@dataclass
class QwenPixels:
    """The images of a batch, padded to the patches of one bucket.

    patches: normalised pixels, a row a patch, zeros at padding.
    place: row and column of each patch in its image, in patches.
    windows: the patches of each attention window, in order; P where a window is not full.
    slot: where each patch stands in the flattened windows; W * S for padding.
    count: patches of each image, 0 for a padding image.
    """

    patches: Float[AnyArray, "I P values"]
    place: Int[AnyArray, "I P 2"]
    windows: Int[AnyArray, "I W S"]
    slot: Int[AnyArray, "I P"]
    count: Int[AnyArray, " I"]


def pack(
    pixel_values: Float[np.ndarray, "total values"],
    grids: Sequence[tuple[int, int]],
    config: QwenVisionConfig,
    images: int,
) -> QwenPixels:
    """Pack the image processor's rows of patches, image after image.

    grids: (rows, columns) of each image, in merged tokens. images: the batch size to pad to.
    Raises RerouteError for more grids than `images`, an empty grid, an image above the largest bucket, and pixels that
    are not those of the grids.
    """
    _check(pixel_values, grids, config, images)
    merge, side = config.merge, config.window // config.merge
    tokens = bucket(
        max((rows * cols for rows, cols in grids), default=1), VISUAL_BUCKETS, "an image counted in visual tokens"
    )
    total, slots = merge**2 * tokens, config.window**2
    width = _windows(grids, tokens, side)
    patches = np.zeros((images, total, config.patch_values), np.float32)
    place, slot = np.zeros((images, total, 2), np.int32), np.full((images, total), width * slots, np.int32)
    windows, count = np.full((images, width * slots), total, np.int32), np.zeros(images, np.int32)
    start = 0
    for i, (rows, cols) in enumerate(grids):
        filled = count[i] = merge**2 * rows * cols
        patches[i, :filled] = pixel_values[start : start + filled]
        place[i, :filled] = _places(rows, cols, merge)
        slot[i, :filled] = _slots(place[i, :filled] // config.window, -(-cols // side), slots)
        windows[i, slot[i, :filled]] = np.arange(filled)
        start += filled
    return QwenPixels(patches, place, windows.reshape(images, width, slots), slot, count)


def most_windows(tokens: int, side: int, aspect: int) -> int:
    """The most windows of `side * side` tokens that an image of at most `tokens` tokens can touch, if its longer side
    is at most `aspect` times the shorter."""
    shorter = range(1, math.isqrt(tokens) + 1)
    return max(-(-rows // side) * -(-min(tokens // rows, aspect * rows) // side) for rows in shorter)


def _windows(grids: Sequence[tuple[int, int]], tokens: int, side: int) -> int:
    """One of two numbers a bucket, so that programs stay few."""
    ordinary = most_windows(tokens, side, ORDINARY_ASPECT)
    needed = max((-(-rows // side) * -(-cols // side) for rows, cols in grids), default=1)
    return ordinary if needed <= ordinary else most_windows(tokens, side, tokens)


def _places(rows: int, cols: int, merge: int) -> Int[np.ndarray, "P 2"]:
    block_row, block_col, y, x = np.indices((rows, cols, merge, merge)).reshape(4, -1)
    return np.stack([block_row * merge + y, block_col * merge + x], axis=1)


def _slots(cell: Int[np.ndarray, "P 2"], cells_per_row: int, size: int) -> Int[np.ndarray, " P"]:
    """Slots of patches that lie in window `cell` (row, column): windows in raster order, `size` slots each, filled
    from the front in the order of the patches."""
    window = cell[:, 0] * cells_per_row + cell[:, 1]
    order = np.argsort(window, kind="stable")
    first = np.searchsorted(window[order], window[order])
    slots = np.empty_like(window)
    slots[order] = window[order] * size + np.arange(len(window)) - first
    return slots


def _check(pixel_values, grids, config: QwenVisionConfig, images: int) -> None:
    if len(grids) > images:
        raise RerouteError(f"{len(grids)} images do not fit a batch padded to {images}: pass a larger padded size")
    for rows, cols in grids:
        if rows < 1 or cols < 1:
            raise RerouteError(f"an image has a grid of {rows}x{cols} visual tokens: expected at least 1x1")
    rows = config.merge**2 * sum(rows * cols for rows, cols in grids)
    if pixel_values.shape != (rows, config.patch_values):
        raise RerouteError(
            f"pixel_values have shape {list(pixel_values.shape)}: expected [{rows}, {config.patch_values}] for grids "
            f"{[tuple(grid) for grid in grids]}; pass pixels and grids of the same images, as the processor made them"
        )
