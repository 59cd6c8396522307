"""Qwen3-VL, dense (transformers' `qwen3_vl`): vision tower with full attention and DeepStack, Qwen3 decoder with
interleaved M-RoPE.

Letters: I images, n visual tokens of the largest one (a bucket), C tokens left after a merge, E decoder width, once for
the features and once for each level of DeepStack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from reroute_jax.vision.qwen3 import Qwen3Images, Qwen3Tower
from reroute_jax.vision.qwen3_packing import Qwen3Pixels, pack
from reroute_jax.vision.qwen_config import Qwen3VisionConfig
from reroute_jax.vision.qwen_images import fit_once, grid_of, patches, preprocess, repack, single_size, unpack

NAME = "qwen3_vl"
# Of transformers, where config.json names none.
_DEFAULT_SECTIONS = (24, 20, 20)
# The layout of the hub's Instruct checkpoints: no system sentence unless a chat brings one.
CHAT_TEMPLATE = "{% for message in messages %}" + TURNS


class Qwen3VL(nnx.Module):
    """The parameters of one model; functions in this file and in `decoder.py` run them."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype):
        self.config = config
        self.vision = Qwen3Tower(config.vision, config.decoder.hidden_size, rngs=rngs, dtype=dtype)
        self.decoder = Decoder(config.decoder, rngs=rngs, dtype=dtype)


def _read_config(hf: Any) -> ModelConfig:
    text, vision = hf.text_config, hf.vision_config
    require("text_config.attention_bias", text.attention_bias, (False,))
    require("text_config.hidden_act", text.hidden_act, ("silu",))
    require("text_config.rope_parameters.rope_type", text.rope_parameters.get("rope_type", "default"), ("default",))
    require("vision_config.hidden_act", vision.hidden_act, ("gelu_pytorch_tanh",))
    require("vision_config.out_hidden_size", vision.out_hidden_size, (text.hidden_size,))
    check_rotary_tower(vision)
    sections = tuple(text.rope_parameters.get("mrope_section") or _DEFAULT_SECTIONS)
    if len(sections) != 3:
        raise RerouteError(f"config.json: mrope_section is {list(sections)}, expected three numbers of rotary pairs")
    deepstack = _deepstack(vision, text.num_hidden_layers)
    decoder = decoder_config(text, qkv_bias=False, rope_sections=sections, tied_head=hf.tie_word_embeddings)
    return ModelConfig(
        family=NAME,
        decoder=replace(decoder, rope_interleaved=True, qk_norm=True, deepstack=len(deepstack)),
        vision=Qwen3VisionConfig(
            **vision_sizes(vision),
            table_side=_table_side(vision.num_position_embeddings),
            deepstack=deepstack,
        ),
        **special_tokens(hf),
    )


def _deepstack(vision, num_layers: int) -> tuple[int, ...]:
    """Blocks of the tower that feed DeepStack. Raises RerouteError for blocks that the tower lacks or in another order,
    and for more of them than decoder layers."""
    blocks = tuple(vision.deepstack_visual_indexes)
    if list(blocks) != sorted(set(blocks)) or not all(0 <= block < vision.depth for block in blocks):
        raise RerouteError(
            f"config.json: deepstack_visual_indexes is {list(blocks)}, expected ascending blocks from 0 to "
            f"{vision.depth - 1}"
        )
    if len(blocks) > num_layers:
        raise RerouteError(
            f"config.json: deepstack_visual_indexes names {len(blocks)} blocks, expected no more than the {num_layers} "
            "decoder layers"
        )
    return blocks


def _table_side(positions: int) -> int:
    if math.isqrt(positions) ** 2 != positions:
        raise RerouteError(f"config.json: num_position_embeddings is {positions}, expected a square number")
    return math.isqrt(positions)


def encode_images(
    model: Qwen3VL, pixels: Qwen3Pixels, arrays: dict[str, AnyArray], merge: Merge | None
) -> tuple[Float[Array, "I C E"], Int[Array, "I C"]]:
    """A merge takes DeepStack's features with the weights that it takes the tokens' own with."""
    return reduced(merge, Qwen3Images(model.vision, pixels), arrays)


def _positions(ids: Int[np.ndarray, " S"], grids: Sequence[Grid], config: ModelConfig):
    return mrope_positions(ids, config.image_token, grids)


def _visual_grid(image: Image.Image, config: ModelConfig, processor) -> Grid:
    name = getattr(image, "filename", "") or "an image"
    return grid_of(single_size(image.size, processor, name), processor)


def _settings(config: ModelConfig, open_processor: Callable[[], Any]) -> dict[str, Any]:
    return {"image_resizes": 1, "pixel_limits": pixel_limits(open_processor())}


FAMILY = Family(
    name=NAME,
    one_grid=False,
    options=("pixel_limits",),
    # Nuwa was not released for this family: those of Qwen2.5-VL.
    nuwa=NUWA_RULES,
    released=Released("qwen3vl_scaled", None),
    evaluation=Evaluation("qwen3", "scale_1000", 128),
    read_config=_read_config,
    model=Qwen3VL,
    encode_images=encode_images,
    tower=lambda model, pixels: Qwen3Images(model.vision, pixels),
    tower_sizes=tower_sizes,
    image_grids=image_grids,
    pack=lambda pixel_values, grids, config, images: pack(
        np.asarray(pixel_values, np.float32), grids, config.vision, images
    ),
    positions=_positions,
    token_bucket=token_bucket,
    windows=lambda grids, tokens, config: 0,
    image_processor=open_processor,
    preprocess=lambda images, processor: preprocess(images, processor, fit_once),
    fit=fit_once,
    pixels=patches,
    visual_grid=_visual_grid,
    model_size=single_size,
    typical_grid=typical_grid,
    settings=_settings,
    unpack=lambda pixel_values, grids, config: unpack(pixel_values, grids, config.vision),
    repack=lambda images, grids, config: repack(images, grids, config.vision),
    seen_part=whole_image,
    chat_template=CHAT_TEMPLATE,
    opening=lambda config: "",
)
