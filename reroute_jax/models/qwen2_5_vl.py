"""Qwen2.5-VL (arXiv 2502.13923): windowed vision tower with patch merger, Qwen2.5 decoder with M-RoPE.

Letters: I images, n visual tokens of the largest one (a bucket), C tokens left after a merge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from PIL import Image

from reroute_jax.config import ModelConfig, decoder_config, require
from reroute_jax.decoder import Decoder
from reroute_jax.errors import RerouteError
from reroute_jax.models.family import Evaluation, Family, Released
from reroute_jax.models.qwen_shared import (
    NUWA_RULES,
    TURNS,
    check_rotary_tower,
    image_grids,
    open_processor,
    pixel_limits,
    special_tokens,
    token_bucket,
    tower_sizes,
    typical_grid,
    vision_sizes,
    whole_image,
)
from reroute_jax.nn.mrope import mrope_positions
from reroute_jax.routing.merge import Merge, reduced
from reroute_jax.types import AnyArray, Grid
from reroute_jax.vision.qwen2_5 import QwenImages, QwenTower
from reroute_jax.vision.qwen_config import QwenVisionConfig
from reroute_jax.vision.qwen_images import final_size, fit, patches, preprocess, repack, unpack, visual_grid
from reroute_jax.vision.qwen_windows import QwenPixels, pack, window_count

NAME = "qwen2_5_vl"
# Of transformers, where config.json names none.
_DEFAULT_SECTIONS = (16, 24, 24)
# The layout of the hub's checkpoints, with their default system sentence.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}" + TURNS
)


class QwenVL(nnx.Module):
    """The parameters of one model; functions in this file and in `decoder.py` run them."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype):
        self.config = config
        self.vision = QwenTower(config.vision, config.decoder.hidden_size, rngs=rngs, dtype=dtype)
        self.decoder = Decoder(config.decoder, rngs=rngs, dtype=dtype)


def _read_config(hf: Any) -> ModelConfig:
    text, vision = hf.text_config, hf.vision_config
    require("use_sliding_window", text.use_sliding_window, (False,))
    rope_type = text.rope_parameters.get("rope_type", "default")
    require("rope_parameters.rope_type", rope_type, ("default", "mrope"))
    for kind in text.layer_types:
        require("text_config.layer_types", kind, ("full_attention",))
    check_rotary_tower(vision)
    require("vision_config.hidden_act", vision.hidden_act, ("silu",))
    require("vision_config.out_hidden_size", vision.out_hidden_size, (text.hidden_size,))
    patches = vision.window_size // vision.patch_size
    return ModelConfig(
        family=NAME,
        decoder=decoder_config(
            text, qkv_bias=True, rope_sections=_rope_sections(text), tied_head=hf.tie_word_embeddings
        ),
        vision=QwenVisionConfig(
            **vision_sizes(vision),
            window=patches // vision.spatial_merge_size * vision.spatial_merge_size,
            full_attention=tuple(vision.fullatt_block_indexes),
        ),
        **special_tokens(hf),
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


def _pack(pixel_values, grids: Sequence[Grid], config: ModelConfig, images: int) -> QwenPixels:
    return pack(np.asarray(pixel_values, np.float32), grids, config.vision, images)


def _positions(ids: Int[np.ndarray, " S"], grids: Sequence[Grid], config: ModelConfig):
    return mrope_positions(ids, config.image_token, grids, config.mrope_compat, config.temporal_rate)


def _visual_grid(image: Image.Image, config: ModelConfig, processor) -> Grid:
    return visual_grid(image.size, processor, getattr(image, "filename", "") or "an image")


def _settings(config: ModelConfig, open_processor: Callable[[], Any]) -> dict[str, Any]:
    return {"image_resizes": 2, "pixel_limits": pixel_limits(open_processor()), "mrope_compat": config.mrope_compat}


FAMILY = Family(
    name=NAME,
    one_grid=False,
    options=("mrope_compat", "pixel_limits"),
    nuwa=replace(
        NUWA_RULES,
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
    tower=lambda model, pixels: QwenImages(model.vision, pixels),
    tower_sizes=tower_sizes,
    image_grids=image_grids,
    pack=_pack,
    positions=_positions,
    token_bucket=token_bucket,
    windows=lambda grids, tokens, config: window_count(grids, tokens, config.vision),
    image_processor=open_processor,
    preprocess=preprocess,
    fit=fit,
    pixels=patches,
    visual_grid=_visual_grid,
    model_size=final_size,
    typical_grid=typical_grid,
    settings=_settings,
    unpack=lambda pixel_values, grids, config: unpack(pixel_values, grids, config.vision),
    repack=lambda images, grids, config: repack(images, grids, config.vision),
    seen_part=whole_image,
    chat_template=CHAT_TEMPLATE,
    opening=lambda config: "",
)
