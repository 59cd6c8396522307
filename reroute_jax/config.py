"""Frozen model configurations, read from the `config.json` of a Hugging Face checkpoint.

`transformers` fills in what sparse hub configs leave out, and reads both the hub's spelling and the one that
transformers 5 writes (`rope_parameters`, nested `text_config`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, LlavaConfig, Qwen2_5_VLConfig

from reroute_jax.errors import RerouteError


@dataclass(frozen=True)
class DecoderConfig:
    """A LLaMA-style decoder: RMSNorm, rotary positions, grouped-query attention, gated SiLU MLP.

    rope_sections: rotary pairs that turn with the temporal, vertical and horizontal position (M-RoPE); empty where a
    token has one position.
    """

    vocab_size: int
    hidden_size: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    qkv_bias: bool
    rope_sections: tuple[int, ...]
    tied_head: bool


@dataclass(frozen=True)
class ClipConfig:
    """A CLIP vision transformer and LLaVA's projector behind it. `feature_layer` indexes the tower's hidden states
    (0 = input of the first block)."""

    hidden_size: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    norm_eps: float
    activation: str
    feature_layer: int
    projector_bias: bool
    projector_activation: str

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of one image as (rows, columns)."""
        side = self.image_size // self.patch_size
        return side, side


@dataclass(frozen=True)
class QwenVisionConfig:
    """The vision transformer of Qwen2.5-VL (arXiv 2502.13923) and its patch merger. Images have any size.

    merge: side of the block of patches that becomes one visual token. window: side, in patches, of an attention
    window; the layers in `full_attention` see the whole image instead.
    """

    hidden_size: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    patch_size: int
    temporal_patch_size: int
    merge: int
    window: int
    full_attention: tuple[int, ...]

    @property
    def patch_values(self) -> int:
        """Numbers in one patch: channel, time, y, x."""
        return 3 * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class ModelConfig:
    """A vision-language model. repetition_penalty: what the family generates with unless told otherwise.

    Of Qwen2.5-VL alone: video_token, which is refused; mrope_compat, whose rotary positions to reproduce (`mrope.py`),
    and temporal_rate, temporal positions a second of video, which that needs. Of LLaVA alone: vicuna_system, whether a
    prompt opens with Vicuna's system sentence.
    """

    family: str
    decoder: DecoderConfig
    vision: ClipConfig | QwenVisionConfig
    image_token: int
    bos_token: int | None
    eos_tokens: tuple[int, ...]
    pad_token: int
    repetition_penalty: float = 1.0
    video_token: int | None = None
    temporal_rate: int | None = None
    mrope_compat: str | None = None
    vicuna_system: bool = False

    @classmethod
    def from_hf(cls, config: Mapping) -> ModelConfig:
        """Read a `config.json` that was parsed to a mapping.

        Raises RerouteError for an architecture or a setting that is not implemented.
        """
        family = config.get("model_type")
        if family not in _READERS:
            known = " or ".join(repr(name) for name in _READERS)
            raise RerouteError(f"unknown architecture {family!r} in config.json: expected model_type {known}")
        try:
            hf = AutoConfig.for_model(**config)
        except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError) as problem:
            reason = " ".join(str(problem).split())
            raise RerouteError(f"config.json cannot be read ({reason}): restore it from the original") from problem
        return _READERS[family](hf)

    @property
    def num_layers(self) -> int:
        return self.decoder.num_layers


def _from_llava(hf: LlavaConfig) -> ModelConfig:
    text, vision = hf.text_config, hf.vision_config
    _require("text_config.model_type", text.model_type, ("llama",))
    _require("text_config.attention_bias", text.attention_bias, (False,))
    _require("text_config.mlp_bias", text.mlp_bias, (False,))
    _require("text_config.rope_parameters.rope_type", text.rope_parameters["rope_type"], ("default",))
    _require("vision_config.model_type", vision.model_type, ("clip_vision_model",))
    _require("vision_feature_select_strategy", hf.vision_feature_select_strategy, ("default",))
    _require("vision_feature_layer as one integer", isinstance(hf.vision_feature_layer, int), (True,))
    eos = _tokens(text.eos_token_id)
    pads = (getattr(hf, "pad_token_id", None), text.pad_token_id, *eos)
    return ModelConfig(
        family="llava",
        decoder=_decoder(text, qkv_bias=False, rope_sections=(), tied_head=hf.tie_word_embeddings),
        vision=ClipConfig(
            hidden_size=vision.hidden_size,
            mlp_dim=vision.intermediate_size,
            num_layers=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            norm_eps=vision.layer_norm_eps,
            activation=vision.hidden_act,
            feature_layer=_hidden_state_index(hf.vision_feature_layer, vision.num_hidden_layers),
            projector_bias=hf.multimodal_projector_bias,
            projector_activation=hf.projector_hidden_act,
        ),
        image_token=hf.image_token_index,
        bos_token=text.bos_token_id,
        eos_tokens=eos,
        pad_token=next(token for token in pads if token is not None),
    )


def _from_qwen(hf: Qwen2_5_VLConfig) -> ModelConfig:
    text, vision = hf.text_config, hf.vision_config
    rope = text.rope_parameters
    _require("use_sliding_window", text.use_sliding_window, (False,))
    _require("rope_parameters.rope_type", rope.get("rope_type", "default"), ("default", "mrope"))
    _require("vision_config.hidden_act", vision.hidden_act, ("silu",))
    _require("vision_config.out_hidden_size", vision.out_hidden_size, (text.hidden_size,))
    patches = vision.window_size // vision.patch_size
    # The hub's config.json has 151645, <|im_end|>; its generation config adds 151643 and is not followed.
    eos = _tokens(text.eos_token_id)
    return ModelConfig(
        family="qwen2_5_vl",
        decoder=_decoder(
            text, qkv_bias=True, rope_sections=tuple(rope["mrope_section"]), tied_head=hf.tie_word_embeddings
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
        eos_tokens=eos,
        pad_token=text.bos_token_id if text.pad_token_id is None else text.pad_token_id,
        repetition_penalty=1.05,
        video_token=hf.video_token_id,
        temporal_rate=vision.tokens_per_second,
    )


_READERS = {"llava": _from_llava, "qwen2_5_vl": _from_qwen}


def _decoder(text, *, qkv_bias: bool, rope_sections: tuple[int, ...], tied_head: bool) -> DecoderConfig:
    _require("text_config.hidden_act", text.hidden_act, ("silu",))
    return DecoderConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        mlp_dim=text.intermediate_size,
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        rope_theta=float(text.rope_parameters["rope_theta"]),
        norm_eps=text.rms_norm_eps,
        qkv_bias=qkv_bias,
        rope_sections=rope_sections,
        tied_head=tied_head,
    )


def _tokens(ids: int | list[int] | None) -> tuple[int, ...]:
    return tuple(ids) if isinstance(ids, list) else (() if ids is None else (ids,))


def _hidden_state_index(layer: int, num_layers: int) -> int:
    """HF counts hidden states: `num_layers + 1` of them, negative from the end."""
    return layer if layer >= 0 else num_layers + 1 + layer


def _require(name: str, value: object, supported: tuple) -> None:
    if value not in supported:
        raise RerouteError(f"config.json: {name} = {value!r} is not implemented, expected one of {list(supported)}")
