"""Host packing of Qwen3-VL's images: padded patches, and how each reads the table of learned positions (numpy).

Letters: I images, P patches of the largest one (a bucket).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float, Int

from reroute_jax.types import AnyArray, Grid
from reroute_jax.vision.qwen_config import Qwen3VisionConfig
from reroute_jax.vision.qwen_patches import padded


@jax.tree_util.register_dataclass
@dataclass
class Qwen3Pixels:
    """The images of a batch, padded to the patches of one bucket.

    patches: normalised pixels, a row a patch, zeros at padding.
    place: row and column of each patch in its image, in patches.
    taps, weights: rows of the position table that a patch's position is made of, and how much of each; 0 at padding.
    count: patches of each image, 0 for a padding image.
    """

    patches: Float[AnyArray, "I P values"]
    place: Int[AnyArray, "I P 2"]
    taps: Int[AnyArray, "I P 4"]
    weights: Float[AnyArray, "I P 4"]
    count: Int[AnyArray, " I"]


def pack(
    pixel_values: Float[np.ndarray, "total values"], grids: Sequence[Grid], config: Qwen3VisionConfig, images: int
) -> Qwen3Pixels:
    """Pack the image processor's rows of patches, image after image.

    grids: (rows, columns) of each image, in merged tokens. images: the batch size to pad to. Raises RerouteError as
    `padded`.
    """
    patches, place, count = padded(pixel_values, grids, config.merge, config.patch_values, images)
    taps, weights = np.zeros((*place.shape[:2], 4), np.int32), np.zeros((*place.shape[:2], 4), np.float32)
    for i, (rows, cols) in enumerate(grids):
        sides = rows * config.merge, cols * config.merge
        taps[i, : count[i]], weights[i, : count[i]] = table_taps(place[i, : count[i]], sides, config.table_side)
    return Qwen3Pixels(patches, place, taps, weights, count)


def table_taps(
    place: Int[np.ndarray, "P 2"], sides: tuple[int, int], table_side: int
) -> tuple[Int[np.ndarray, "P 4"], Float[np.ndarray, "P 4"]]:
    """Rows of the table, which is row-major, and weights of the bilinear interpolation that lays the corners of a grid
    of `sides` (rows, columns) patches on the corners of the table."""
    last = table_side - 1
    at = place * last / np.maximum(np.array(sides) - 1, 1)
    low = np.floor(at).astype(np.int32)
    high, part = np.minimum(low + 1, last), at - low
    rows, cols = (np.stack([low[:, axis], high[:, axis]], axis=1) for axis in (0, 1))
    of_row, of_col = (np.stack([1 - part[:, axis], part[:, axis]], axis=1) for axis in (0, 1))
    taps = rows[:, :, None] * table_side + cols[:, None]
    weights = of_row[:, :, None] * of_col[:, None]
    return taps.reshape(-1, 4), weights.reshape(-1, 4).astype(np.float32)
