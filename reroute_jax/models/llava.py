"""LLaVA-1.5 (arXiv 2310.03744): CLIP tower, two-layer projector, LLaMA decoder.

Letters: I images, n patches of an image, C tokens left of them after a merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from reroute_jax.config import ModelConfig, decoder_config, require, token_ids
from reroute_jax.decoder import Decoder
from reroute_jax.errors import RerouteError
from reroute_jax.models.family import Evaluation, Family, Released, check_processor
from reroute_jax.routing.merge import Merge, reduced
from reroute_jax.routing.nuwa_rules import NuwaRules
from reroute_jax.routing.tower import TowerSizes
from reroute_jax.types import AnyArray, Grid, Size
from reroute_jax.vision.clip import ClipConfig, ClipImages, ClipTower, Projector

NAME = "llava"
_LARGEST_SIDE = 8192  # in pixels, of images before they are cropped
# vicuna_v1 of LLaVA's own evaluation.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
# The layout of the hub's checkpoints, roles in capitals and a message's images before its text.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role != 'system' %}{{ message.role | upper + ': ' }}{% endif %}"
    "{% for part in message.content if part.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


class Llava(nnx.Module):
    """The parameters of one model; functions in this file and in `decoder.py` run them."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype):
        self.config = config
        self.vision = ClipTower(config.vision, rngs=rngs, dtype=dtype)
        self.projector = Projector(config.vision, config.decoder.hidden_size, rngs=rngs, dtype=dtype)
        self.decoder = Decoder(config.decoder, rngs=rngs, dtype=dtype)


def _read_config(hf: Any) -> ModelConfig:
    text, vision = hf.text_config, hf.vision_config
    require("text_config.model_type", text.model_type, ("llama",))
    require("text_config.attention_bias", text.attention_bias, (False,))
    require("text_config.mlp_bias", text.mlp_bias, (False,))
    require("text_config.rope_parameters.rope_type", text.rope_parameters["rope_type"], ("default",))
    require("vision_config.model_type", vision.model_type, ("clip_vision_model",))
    if hf.vision_feature_select_strategy != "default":
        raise RerouteError(
            f"config.json: vision_feature_select_strategy is {hf.vision_feature_select_strategy!r}, which keeps the "
            "tower's class token as a visual token without a place in the image: only 'default' (patches) is supported"
        )
    pad = getattr(hf, "pad_token_id", None)
    return ModelConfig(
        family=NAME,
        decoder=decoder_config(text, qkv_bias=False, rope_sections=(), tied_head=hf.tie_word_embeddings),
        vision=ClipConfig(
            hidden_size=vision.hidden_size,
            mlp_dim=vision.intermediate_size,
            num_layers=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            norm_eps=vision.layer_norm_eps,
            activation=vision.hidden_act,
            feature_layers=_hidden_states(hf.vision_feature_layer, vision.num_hidden_layers),
            projector_bias=hf.multimodal_projector_bias,
            projector_activation=hf.projector_hidden_act,
        ),
        image_token=hf.image_token_index,
        bos_token=text.bos_token_id,
        eos_tokens=token_ids(text.eos_token_id),
        pad_token=text.pad_token_id if pad is None else pad,
    )


def _hidden_states(layers: int | list[int], num_layers: int) -> tuple[int, ...]:
    """HF counts hidden states: `num_layers + 1` of them, negative from the end. Raises RerouteError for others."""
    given = [layers] if isinstance(layers, int) else list(layers)
    if not given or not all(type(layer) is int and -num_layers - 1 <= layer <= num_layers for layer in given):
        raise RerouteError(
            f"config.json: vision_feature_layer is {layers!r}, expected hidden states from {-num_layers - 1} to "
            f"{num_layers}, one or a list"
        )
    return tuple(layer if layer >= 0 else num_layers + 1 + layer for layer in given)


def encode_images(
    model: Llava,
    pixels: Float[Array, "I 3 height width"],
    arrays: dict[str, AnyArray],
    merge: Merge | None,
) -> tuple[Float[Array, "I C D"], Int[Array, "I C"]]:
    """See `Family`."""
    return reduced(merge, _tower(model, pixels), arrays)


def _tower(model: Llava, pixels: Float[Array, "I 3 height width"]) -> ClipImages:
    return ClipImages(model.vision, model.projector, pixels, model.config.vision.feature_layers)


def _tower_sizes(config: ModelConfig) -> TowerSizes:
    vision = config.vision
    return TowerSizes(
        width=vision.hidden_size,
        head_dim=vision.hidden_size // vision.num_heads,
        patches=1,
        class_token=True,
        features=vision.hidden_size * len(vision.feature_layers),
        similarity=vision.hidden_size,
        projected=config.decoder.hidden_size,
    )


def image_grids(pixel_values, image_grid_thw, config: ModelConfig) -> list[Grid]:
    """Every image has the tower's own grid."""
    if image_grid_thw is not None:
        raise RerouteError("image_grid_thw is given, but every LLaVA image has the same grid: leave it out")
    if pixel_values is None:
        return []
    shape, side = np.shape(pixel_values), config.vision.image_size
    if len(shape) != 4 or shape[1:] != (3, side, side):
        raise RerouteError(f"pixel_values are {list(shape)}: expected [images, 3, {side}, {side}]")
    return [config.vision.grid] * shape[0]


def _pack(pixel_values, grids: Sequence[Grid], config: ModelConfig, images: int) -> Float[np.ndarray, "I 3 h w"]:
    return np.pad(np.asarray(pixel_values, np.float32), ((0, images - len(grids)), (0, 0), (0, 0), (0, 0)))


def _open_processor(folder: Path, config: ModelConfig):
    from transformers import AutoImageProcessor

    # Without a name transformers takes torchvision where it is installed, and pixels change with it.
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    side, crop = config.vision.image_size, processor.crop_size
    asked = dict(processor.size)
    sizes = [asked[edge] for edge in ("shortest_edge", "height", "width") if asked.get(edge) is not None]
    if processor.do_resize and not (sizes and all(type(size) is int and 0 < size <= _LARGEST_SIDE for size in sizes)):
        raise RerouteError(f"the image processor's size is {asked}, expected pixels of the shortest edge")
    check_processor(
        processor,
        {
            "do_center_crop": (processor.do_center_crop, True),
            "crop_size": ((crop["height"], crop["width"]), (side, side)),
        },
    )
    return processor


def _seen_part(size: Size, processor) -> tuple[float, float, float, float]:
    """The centre crop of the image as the processor resized it: its shorter side to `shortest_edge`, or both sides."""
    asked = dict(processor.size)
    if (short := asked.get("shortest_edge")) is None:
        resized = [asked["width"], asked["height"]]
    else:
        resized = [int(short * side / min(size)) for side in size]
    crop = processor.crop_size["width"], processor.crop_size["height"]
    first = [(side - kept) // 2 for side, kept in zip(resized, crop, strict=True)]
    (x, y), (width, height) = first, resized
    return x / width, y / height, (x + crop[0]) / width, (y + crop[1]) / height


def _check_form(image: Image.Image, processor) -> None:
    """Raises RerouteError for an image so long that, before it is cropped, its resize takes more than Pillow opens."""
    (width, height), side, limit = image.size, processor.crop_size["width"], Image.MAX_IMAGE_PIXELS
    longest = side * max(image.size) // min(image.size)
    if limit is not None and longest * side > limit:
        raise RerouteError(
            f"{getattr(image, 'filename', '') or 'an image'} has {width} x {height} pixels, whose resize to "
            f"{side} x {longest} is above the limit of {limit} (PIL.Image.MAX_IMAGE_PIXELS): crop it"
        )


def _visual_grid(image: Image.Image, config: ModelConfig, processor) -> Grid:
    _check_form(image, processor)
    return config.vision.grid


def _fit(image: Image.Image, processor) -> UInt8[np.ndarray, "height width 3"]:
    """The RGB image resized and cropped."""
    _check_form(image, processor)
    seen = processor(images=image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    return np.ascontiguousarray(seen[0].astype(np.uint8).transpose(1, 2, 0))


def _pixels(fitted: Sequence[np.ndarray], processor) -> tuple[Float[np.ndarray, "I 3 height width"], None]:
    images = [Image.fromarray(image) for image in fitted]
    made = processor(images=images, do_resize=False, do_center_crop=False, return_tensors="np")
    return made["pixel_values"], None


FAMILY = Family(
    name=NAME,
    one_grid=True,
    options=("vicuna_system", "llava_image_mode"),
    nuwa=NuwaRules(
        "previous_layer",
        quantile=Fraction(11, 20),
        diagonal_radius=False,
        self_weight_override=True,
        first=16,
        depth=32,
        fixed_counts=True,
    ),
    released=Released("llava15", 32),
    evaluation=Evaluation("full", "normalized", 1024),
    read_config=_read_config,
    model=Llava,
    encode_images=encode_images,
    tower=_tower,
    tower_sizes=_tower_sizes,
    image_grids=image_grids,
    pack=_pack,
    positions=lambda ids, grids, config: (np.arange(len(ids)), len(ids)),
    token_bucket=lambda tokens: tokens,
    windows=lambda grids, tokens, config: 0,
    image_processor=_open_processor,
    preprocess=lambda images, processor: _pixels([_fit(image, processor) for image in images], processor),
    fit=_fit,
    pixels=_pixels,
    visual_grid=_visual_grid,
    model_size=lambda size, processor: (processor.crop_size["width"], processor.crop_size["height"]),
    typical_grid=lambda config, open_processor: config.vision.grid,
    settings=lambda config, open_processor: {"vicuna_system": config.vicuna_system},
    unpack=lambda pixel_values, grids, config: list(np.asarray(pixel_values, np.float32).transpose(0, 2, 3, 1)),
    repack=lambda images, grids, config: np.stack(images).transpose(0, 3, 1, 2),
    seen_part=_seen_part,
    chat_template=CHAT_TEMPLATE,
    opening=lambda config: VICUNA_SYSTEM if config.vicuna_system else "",
)
