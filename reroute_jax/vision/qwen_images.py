"""Images as the Qwen models get them: Qwen2.5-VL by the two resizes of the reference (qwen_vl_utils, then the image
processor), Qwen3-VL by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from reroute_jax.errors import RerouteError
from reroute_jax.types import Grid, Size
from reroute_jax.vision.qwen_config import Qwen3VisionConfig, QwenVisionConfig

LARGEST_RATIO = 200
_FIRST_TOKENS = (4, 16384)  # limits of the first resize, in visual tokens


def smart_resize(size: Size, factor: int, fewest: int, most: int, name: str = "an image") -> Size:
    """(width, height) in whole multiples of `factor` with `fewest` to `most` pixels, near the form of `size`.

    Each side goes to the nearest multiple (ties to the even one), but never to 0. If that is too large or too small,
    both sides are scaled from their given, unrounded values and cut down or up to multiples. Raises RerouteError for
    sides of a ratio over LARGEST_RATIO, with the image's `name`.
    """
    width, height = size
    if max(size) > LARGEST_RATIO * min(size):
        raise RerouteError(f"{name} has {width} x {height} pixels: expected sides of a ratio up to {LARGEST_RATIO}")
    nearest = tuple(max(factor, round(side / factor) * factor) for side in size)
    pixels = math.prod(nearest)
    if fewest <= pixels <= most:
        return nearest
    if pixels > most:
        shrink = math.sqrt(width * height / most)
        return tuple(max(factor, math.floor(side / shrink / factor) * factor) for side in size)
    grow = math.sqrt(fewest / (width * height))
    return tuple(math.ceil(side * grow / factor) * factor for side in size)


def first_size(size: Size, factor: int, name: str = "an image") -> Size:
    """(width, height) after the first resize, whose limits are 4 and 16384 visual tokens of `factor` pixels a side."""
    fewest, most = (tokens * factor**2 for tokens in _FIRST_TOKENS)
    return smart_resize(size, factor, fewest, most, name)


def final_size(size: Size, processor, name: str = "an image") -> Size:
    """(width, height) in pixels that the model sees of an image of `size`, after both resizes.

    processor: the checkpoint's image processor. Raises RerouteError for sizes that are not taken, with `name`.
    """
    factor = processor.patch_size * processor.merge_size
    limits = processor.size["shortest_edge"], processor.size["longest_edge"]
    return smart_resize(first_size(size, factor, name), factor, *limits, name)


def single_size(size: Size, processor, name: str = "an image") -> Size:
    """The same after the image processor's resize alone, which is all that Qwen3-VL's reference makes."""
    factor = processor.patch_size * processor.merge_size
    return smart_resize(size, factor, processor.size["shortest_edge"], processor.size["longest_edge"], name)


def grid_of(size: Size, processor) -> Grid:
    """(rows, cols) of visual tokens, after the merge, of an image that the model sees in `size` (width, height)."""
    factor = processor.patch_size * processor.merge_size
    return size[1] // factor, size[0] // factor


def visual_grid(size: Size, processor, name: str = "an image") -> Grid:
    """(rows, cols) of visual tokens of an image of `size` (width, height); raises as `final_size`."""
    return grid_of(final_size(size, processor, name), processor)


def resize_like_reference(image: Image.Image, factor: int) -> Image.Image:
    """The RGB image after the first resize (bicubic), which the image processor then gets."""
    return image.resize(first_size(image.size, factor), Image.Resampling.BICUBIC)


def fit(image: Image.Image, processor, name: str = "an image") -> UInt8[np.ndarray, "height width 3"]:
    """The RGB image in the size that the model sees, after both resizes: all that `patches` needs of it.

    `patches` makes 8 times as many bytes of it. Raises RerouteError as `final_size`.
    """
    factor = processor.patch_size * processor.merge_size
    final = final_size(image.size, processor, name)
    resized = resize_like_reference(image, factor).resize(final, Image.Resampling(processor.resample))
    return np.asarray(resized)


def fit_once(image: Image.Image, processor, name: str = "an image") -> UInt8[np.ndarray, "height width 3"]:
    """The same after the image processor's resize alone."""
    return np.asarray(image.resize(single_size(image.size, processor, name), Image.Resampling(processor.resample)))


def patches(
    fitted: Sequence[np.ndarray], processor
) -> tuple[Float[np.ndarray, "patches values"], Int[np.ndarray, "images 3"]]:
    """Pixels of at least one image that `fit` made, as the checkpoint's PIL image processor gives them.

    pixel_values: fp32, normalised, the patches of all images one behind the other, each image's by blocks of merge x
    merge patches; a patch's values are by channel, frame (one image, repeated), y and x. image_grid_thw: (1, rows,
    columns) of each image in patches.
    """
    images = [Image.fromarray(image) for image in fitted]
    found = processor(images=images, do_resize=False, return_tensors="np")
    return found["pixel_values"], found["image_grid_thw"]


def preprocess(
    images: Sequence[Image.Image], processor, fit: Callable[..., np.ndarray] = fit
) -> tuple[Float[np.ndarray, "patches values"], Int[np.ndarray, "images 3"]]:
    """`patches` of opened images, each sized by `fit`. Raises RerouteError for a size that is not taken, naming the
    image."""
    names = [f"image {getattr(image, 'filename', '') or number}" for number, image in enumerate(images, 1)]
    return patches([fit(image, processor, name) for image, name in zip(images, names, strict=True)], processor)


def unpack(
    pixel_values: Float[np.ndarray, "patches values"],
    grids: Sequence[Grid],
    config: QwenVisionConfig | Qwen3VisionConfig,
) -> list[Float[np.ndarray, "height width 3"]]:
    """The images that `preprocess` made patches of, normalised as these are. grids: of visual tokens."""
    images, first = [], 0
    merge, side = config.merge, config.patch_size
    for rows, cols in grids:
        count = rows * cols * merge**2
        patches = np.asarray(pixel_values[first : first + count], np.float32)
        patches = patches.reshape(rows, cols, merge, merge, 3, -1, side, side)[..., 0, :, :]  # frames are alike
        image = patches.transpose(0, 2, 5, 1, 3, 6, 4)
        images.append(image.reshape(rows * merge * side, cols * merge * side, 3))
        first += count
    return images


def repack(
    images: Sequence[Float[np.ndarray, "_ _ 3"]],
    grids: Sequence[Grid],
    config: QwenVisionConfig | Qwen3VisionConfig,
) -> Float[np.ndarray, "patches values"]:
    """The patches that `unpack` made these images of; of each patch all frames are alike."""
    merge, side, found = config.merge, config.patch_size, []
    for image, (rows, cols) in zip(images, grids, strict=True):
        patches = image.reshape(rows, merge, side, cols, merge, side, 3).transpose(0, 3, 1, 4, 6, 2, 5)
        frames = np.repeat(patches[:, :, :, :, :, None], config.temporal_patch_size, axis=5)
        found.append(frames.reshape(rows * cols * merge**2, -1))
    return np.concatenate(found)
