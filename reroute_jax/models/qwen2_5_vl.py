"""Qwen2.5-VL (arXiv 2502.13923): windowed vision tower with patch merger, Qwen2.5 decoder with M-RoPE.

Letters: I images, n visual tokens of the largest one (a bucket), C tokens left after a merge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from PIL import Image
from transformers import AutoImageProcessor, Qwen2_5_VLConfig

from reroute_jax.buckets import VISUAL_BUCKETS, bucket
from reroute_jax.config import ModelConfig, decoder_config, require, token_ids
from reroute_jax.decoder import Decoder
from reroute_jax.errors import RerouteError
from reroute_jax.models.family import Evaluation, Family, Released, check_processor
from reroute_jax.nn.mrope import mrope_positions
from reroute_jax.routing.merge import Merge, reduced
from reroute_jax.routing.nuwa_rules import NuwaRules
from reroute_jax.types import AnyArray, Grid
from reroute_jax.vision.qwen2_5 import QwenImages, QwenTower
from reroute_jax.vision.qwen_config import QwenVisionConfig
from reroute_jax.vision.qwen_images import final_size, fit, patches, preprocess, unpack, visual_grid
from reroute_jax.vision.qwen_windows import QwenPixels, pack

NAME = "qwen2_5_vl"
# Of transformers, where config.json names none.
_DEFAULT_SECTIONS = (16, 24, 24)
# The layout of the hub's checkpoints, with their default system sentence.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class QwenVL(nnx.Module):
    """The parameters of one model; functions in this file and in `decoder.py` run them."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype):
        self.config = config
        self.vision = QwenTower(config.vision, config.decoder.hidden_size, rngs=rngs, dtype=dtype)
        self.decoder = Decoder(config.decoder, rngs=rngs, dtype=dtype)


def _read_config(hf: Qwen2_5_VLConfig) -> ModelConfig:
    text, vision = hf.text_config, hf.vision_config
    require("use_sliding_window", text.use_sliding_window, (False,))
    rope_type = text.rope_parameters.get("rope_type", "default")
    require("rope_parameters.rope_type", rope_type, ("default", "mrope"))
    require("vision_config.hidden_act", vision.hidden_act, ("silu",))
    require("vision_config.out_hidden_size", vision.out_hidden_size, (text.hidden_size,))
    patches = vision.window_size // vision.patch_size
    return ModelConfig(
        family=NAME,
        decoder=decoder_config(
            text, qkv_bias=True, rope_sections=_rope_sections(text), tied_head=hf.tie_word_embeddings
        ),
        vision=QwenVisionConfig(
            hidden_size=vision.hidden_size,
            mlp_dim=vision.intermediate_size,
            num_layers=vision.depth,
            num_heads=vision.num_heads,
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge=vision.spatial_merge_size,
            window=patches // vision.spatial_merge_size * vision.spatial_merge_size,
            full_attention=tuple(vision.fullatt_block_indexes),
        ),
        image_token=hf.image_token_id,
        bos_token=None,
        eos_tokens=token_ids(text.eos_token_id),
        pad_token=text.bos_token_id if text.pad_token_id is None else text.pad_token_id,
        video_token=hf.video_token_id,
        temporal_rate=vision.tokens_per_second,
    )


def _rope_sections(text) -> tuple[int, ...]:
    """Of a text_config. Raises RerouteError where they are not those of a head."""
    sections = text.rope_parameters.get("mrope_section") or _DEFAULT_SECTIONS
    pairs = (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads) // 2
    if len(sections) != 3 or sum(sections) != pairs:
        raise RerouteError(
            f"config.json: mrope_section is {list(sections)}, expected three numbers that add up to the {pairs} rotary "
            "pairs of a head"
        )
    return tuple(sections)


def encode_images(
    model: QwenVL, pixels: QwenPixels, arrays: dict[str, AnyArray], merge: Merge | None
) -> tuple[Float[Array, "I C D"], Int[Array, "I C"]]:
    """Every merge works on what leaves the patch merger (5.3)."""
    return reduced(merge, QwenImages(model.vision, pixels), arrays)


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


def _pack(pixel_values, grids: Sequence[Grid], config: ModelConfig, images: int) -> QwenPixels:
    return pack(np.asarray(pixel_values, np.float32), grids, config.vision, images)


def _positions(ids: Int[np.ndarray, " S"], grids: Sequence[Grid], config: ModelConfig):
    return mrope_positions(ids, config.image_token, grids, config.mrope_compat, config.temporal_rate)


def _open_processor(folder: Path, config: ModelConfig):
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


def _visual_grid(image: Image.Image, config: ModelConfig, processor) -> Grid:
    return visual_grid(image.size, processor, getattr(image, "filename", "") or "an image")


def _typical_grid(config: ModelConfig, open_processor: Callable[[], Any]) -> Grid:
    """A square of as many visual tokens as an image can have."""
    most = open_processor().size["longest_edge"] if config.pixel_limits is None else config.pixel_limits[1]
    tokens = most // (config.vision.patch_size * config.vision.merge) ** 2
    return math.isqrt(tokens), math.isqrt(tokens)


def _settings(config: ModelConfig, open_processor: Callable[[], Any]) -> dict[str, Any]:
    limits = [open_processor().size[edge] for edge in ("shortest_edge", "longest_edge")]
    return {"image_resizes": 2, "pixel_limits": limits, "mrope_compat": config.mrope_compat}


FAMILY = Family(
    name=NAME,
    options=("mrope_compat", "pixel_limits"),
    nuwa=NuwaRules(
        "previous_layer_last_three",
        quantile=Fraction(1, 10),
        diagonal_radius=True,
        self_weight_override=False,
        first=15,
        depth=28,
        fixed_counts=False,
        released={
            0.25: (Fraction(35, 100), 0.42, 3),
            0.5: (Fraction(60, 100), 0.66, 3),
            0.75: (Fraction(85, 100), 0.70, 4),
        },
    ),
    released=Released("qwen25vl", 28),
    evaluation=Evaluation("nuwa", "pixel", 128),
    read_config=_read_config,
    model=QwenVL,
    encode_images=encode_images,
    image_grids=image_grids,
    pack=_pack,
    positions=_positions,
    token_bucket=lambda tokens: bucket(tokens, VISUAL_BUCKETS, "an image or a row, in visual tokens,"),
    image_processor=_open_processor,
    preprocess=preprocess,
    fit=fit,
    pixels=patches,
    visual_grid=_visual_grid,
    model_size=final_size,
    typical_grid=_typical_grid,
    settings=_settings,
    unpack=lambda pixel_values, grids, config: unpack(pixel_values, grids, config.vision),
    seen_part=lambda size, processor: (0.0, 0.0, 1.0, 1.0),
    chat_template=CHAT_TEMPLATE,
    opening=lambda config: "",
)
