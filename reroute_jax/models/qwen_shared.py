"""What both Qwen families share: the image processor they are released with, and the grids that it makes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoImageProcessor

from reroute_jax.buckets import VISUAL_BUCKETS, bucket
from reroute_jax.config import ModelConfig
from reroute_jax.errors import RerouteError
from reroute_jax.models.family import check_processor
from reroute_jax.types import Grid

# What stands in a chat for an image, and the turns, as the hub's checkpoints write them.
TURNS = (
    "{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def image_grids(pixel_values, image_grid_thw, config: ModelConfig) -> list[Grid]:
    """(rows, columns) after the patch merger of every image."""
    if (pixel_values is None) != (image_grid_thw is None):
        raise RerouteError("pixel_values and image_grid_thw belong together: give both as the HF processor does")
    if pixel_values is None:
        return []
    thw, merge = np.asarray(image_grid_thw), config.vision.merge
    if thw.ndim != 2 or thw.shape[1] != 3:
        raise RerouteError(f"image_grid_thw is {list(thw.shape)}: expected [images, 3]")
    for number, (frames, rows, cols) in enumerate(thw.tolist(), 1):
        if frames != 1:
            raise RerouteError(f"image {number} has {frames} frames: videos are not supported, give still images")
        if rows % merge or cols % merge or min(rows, cols) < merge:
            raise RerouteError(f"image {number} has a grid of {rows} x {cols} patches: expected multiples of {merge}")
    return [(rows // merge, cols // merge) for _, rows, cols in thw.tolist()]


def open_processor(folder: Path, config: ModelConfig):
    """The checkpoint's processor, with its own pixel limits unless `config` has others."""

    def read(limits: tuple[int, int] | None):
        given = {} if limits is None else dict(zip(("min_pixels", "max_pixels"), limits, strict=True))
        return AutoImageProcessor.from_pretrained(folder, backend="pil", **given)

    processor = read(config.pixel_limits)
    if processor.size["longest_edge"] is None and getattr(processor.size, "max_pixels", None) is not None:
        # A spelling that transformers reads and does not follow.
        processor = read((processor.size["min_pixels"], processor.size["max_pixels"]))
    fewest, most = processor.size["shortest_edge"], processor.size["longest_edge"]
    if fewest is None or most is None:
        raise RerouteError(f"the image processor of {folder} has no pixel limits: set min_pixels and max_pixels")
    if fewest > most:
        raise RerouteError(f"the image processor of {folder} has min_pixels {fewest} above max_pixels {most}: mend one")
    vision = config.vision
    check_processor(
        processor,
        {
            "do_resize": (processor.do_resize, True),
            "patch_size": (processor.patch_size, vision.patch_size),
            "merge_size": (processor.merge_size, vision.merge),
            "temporal_patch_size": (processor.temporal_patch_size, vision.temporal_patch_size),
        },
    )
    return processor


def typical_grid(config: ModelConfig, open_processor: Callable[[], Any]) -> Grid:
    """A square of as many visual tokens as an image can have."""
    most = open_processor().size["longest_edge"] if config.pixel_limits is None else config.pixel_limits[1]
    tokens = most // (config.vision.patch_size * config.vision.merge) ** 2
    return math.isqrt(tokens), math.isqrt(tokens)


def token_bucket(tokens: int) -> int:
    """The number of visual tokens that a program is compiled for."""
    return bucket(tokens, VISUAL_BUCKETS, "an image or a row, in visual tokens,")
