"""Host packing that both Qwen towers share: patches padded to buckets, and where each stands in its image (numpy).

Patches keep the order of the image processor: merge blocks in raster order, `merge^2` patches each in raster order.
Letters: I images, P patches of the largest one (a bucket).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from reroute_jax.buckets import VISUAL_BUCKETS, bucket
from reroute_jax.errors import RerouteError
from reroute_jax.types import Grid


class Patches(NamedTuple):
    """patches: normalised pixels, a row a patch, zeros at padding. place: row and column of each in its image, in
    patches. count: patches of each image, 0 for a padding image."""

    patches: Float[np.ndarray, "I P values"]
    place: Int[np.ndarray, "I P 2"]
    count: Int[np.ndarray, " I"]


def padded(
    pixel_values: Float[np.ndarray, "total values"], grids: Sequence[Grid], merge: int, values: int, images: int
) -> Patches:
    """The image processor's rows of patches, image after image, padded to the bucket of the largest image.

    grids: (rows, columns) of each image, in merged tokens. merge: side of a token in patches. values: numbers of a
    patch. images: the batch size to pad to.
    Raises RerouteError for more grids than `images`, an empty grid, an image above the largest bucket, and pixels that
    are not those of the grids.
    """
    _check(pixel_values, grids, merge, values, images)
    tokens = bucket(
        max((rows * cols for rows, cols in grids), default=1), VISUAL_BUCKETS, "an image counted in visual tokens"
    )
    total = merge**2 * tokens
    patches, place = np.zeros((images, total, values), np.float32), np.zeros((images, total, 2), np.int32)
    count, start = np.zeros(images, np.int32), 0
    for i, (rows, cols) in enumerate(grids):
        filled = count[i] = merge**2 * rows * cols
        patches[i, :filled] = pixel_values[start : start + filled]
        place[i, :filled] = _places(rows, cols, merge)
        start += filled
    return Patches(patches, place, count)


def _places(rows: int, cols: int, merge: int) -> Int[np.ndarray, "P 2"]:
    block_row, block_col, y, x = np.indices((rows, cols, merge, merge)).reshape(4, -1)
    return np.stack([block_row * merge + y, block_col * merge + x], axis=1)


def _check(pixel_values, grids, merge: int, values: int, images: int) -> None:
    if len(grids) > images:
        raise RerouteError(f"{len(grids)} images do not fit a batch padded to {images}: pass a larger padded size")
    for rows, cols in grids:
        if rows < 1 or cols < 1:
            raise RerouteError(f"an image has a grid of {rows}x{cols} visual tokens: expected at least 1x1")
    rows = merge**2 * sum(rows * cols for rows, cols in grids)
    if pixel_values.shape != (rows, values):
        raise RerouteError(
            f"pixel_values have shape {list(pixel_values.shape)}: expected [{rows}, {values}] for grids "
            f"{[tuple(grid) for grid in grids]}; pass pixels and grids of the same images, as the processor made them"
        )
