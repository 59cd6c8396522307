"""What both Qwen families share: settings of the same name, Nuwa's rules, and the image processor with its grids."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from reroute_jax.buckets import VISUAL_BUCKETS, bucket
from reroute_jax.config import ModelConfig, require, token_ids
from reroute_jax.errors import RerouteError
from reroute_jax.models.family import check_processor
from reroute_jax.routing.nuwa_rules import NuwaRules
from reroute_jax.routing.tower import TowerSizes
from reroute_jax.types import Grid, Size
from reroute_jax.vision.qwen_layers import ROPE_THETA

# What stands in a chat for an image, and the turns, as the hub's checkpoints write them.
TURNS = (
    "{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# Of Nuwa on Qwen2.5-VL (5), from the middle of the depth on.
NUWA_RULES = NuwaRules(
    "previous_layer_last_three",
    quantile=Fraction(1, 10),
    diagonal_radius=True,
    self_weight_override=False,
    first=15,
    depth=28,
    fixed_counts=False,
)


def vision_sizes(vision) -> dict[str, int]:
    """Of a vision_config, as `PatchedVisionConfig` calls them."""
    return {
        "hidden_size": vision.hidden_size,
        "mlp_dim": vision.intermediate_size,
        "num_layers": vision.depth,
        "num_heads": vision.num_heads,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge": vision.spatial_merge_size,
    }


def check_rotary_tower(vision) -> None:
    """Raises RerouteError for a vision_config whose patches turn with other angles. Not every version of transformers
    names them, nor their kind alike."""
    rotary = getattr(vision, "rope_parameters", None) or {}
    require("vision_config.rope_parameters.rope_type", rotary.get("rope_type", "axial"), ("axial", "default"))
    require("vision_config.rope_parameters.rope_theta", rotary.get("rope_theta", ROPE_THETA), (ROPE_THETA,))


def tower_sizes(config: ModelConfig) -> TowerSizes:
    """DeepStack's levels stand behind a token's own features."""
    vision, width = config.vision, config.decoder.hidden_size
    joined, features = vision.merge**2 * vision.hidden_size, width * (1 + config.decoder.deepstack)
    return TowerSizes(
        width=vision.hidden_size,
        head_dim=vision.hidden_size // vision.num_heads,
        patches=vision.merge**2,
        class_token=False,
        features=features,
        similarity=width,
        projected=features,
        merger=joined * (joined + width),
    )


def special_tokens(hf) -> dict[str, Any]:
    """Of a config.json, as `ModelConfig` calls them."""
    text = hf.text_config
    return {
        "image_token": hf.image_token_id,
        "bos_token": None,
        "eos_tokens": token_ids(text.eos_token_id),
        "pad_token": text.bos_token_id if text.pad_token_id is None else text.pad_token_id,
        "video_token": hf.video_token_id,
    }


def pixel_limits(processor) -> list[int]:
    """Fewest and most pixels of an image."""
    return [processor.size[edge] for edge in ("shortest_edge", "longest_edge")]


def whole_image(size: Size, processor) -> tuple[float, float, float, float]:
    """The model sees all of an image."""
    return 0.0, 0.0, 1.0, 1.0


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
    from transformers import AutoImageProcessor

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
