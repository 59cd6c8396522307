"""Host packing of Qwen2.5-VL's images: padded patches and their attention windows (numpy).

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

from reroute_jax.types import AnyArray
from reroute_jax.vision.qwen_config import QwenVisionConfig
from reroute_jax.vision.qwen_patches import padded

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
    Raises RerouteError as `padded`.
    """
    patches, place, count = padded(pixel_values, grids, config.merge, config.patch_values, images)
    total, slots, side = patches.shape[1], config.window**2, config.window // config.merge
    width = window_count(grids, total // config.merge**2, config)
    slot = np.full((images, total), width * slots, np.int32)
    windows = np.full((images, width * slots), total, np.int32)
    for i, (_, cols) in enumerate(grids):
        slot[i, : count[i]] = _slots(place[i, : count[i]] // config.window, -(-cols // side), slots)
        windows[i, slot[i, : count[i]]] = np.arange(count[i])
    return QwenPixels(patches, place, windows.reshape(images, width, slots), slot, count)


def most_windows(tokens: int, side: int, aspect: int) -> int:
    """The most windows of `side * side` tokens that an image of at most `tokens` tokens can touch, if its longer side
    is at most `aspect` times the shorter."""
    shorter = range(1, math.isqrt(tokens) + 1)
    return max(-(-rows // side) * -(-min(tokens // rows, aspect * rows) // side) for rows in shorter)


def window_count(grids: Sequence[tuple[int, int]], tokens: int, config: QwenVisionConfig) -> int:
    """Those that images in a bucket of `tokens` are padded to: one of two numbers, so that programs stay few."""
    side = config.window // config.merge
    ordinary = most_windows(tokens, side, ORDINARY_ASPECT)
    needed = max((-(-rows // side) * -(-cols // side) for rows, cols in grids), default=1)
    return ordinary if needed <= ordinary else most_windows(tokens, side, tokens)


def _slots(cell: Int[np.ndarray, "P 2"], cells_per_row: int, size: int) -> Int[np.ndarray, " P"]:
    """Slots of patches that lie in window `cell` (row, column): windows in raster order, `size` slots each, filled
    from the front in the order of the patches."""
    window = cell[:, 0] * cells_per_row + cell[:, 1]
    order = np.argsort(window, kind="stable")
    first = np.searchsorted(window[order], window[order])
    slots = np.empty_like(window)
    slots[order] = window[order] * size + np.arange(len(window)) - first
    return slots
