"""Frozen model configurations, read from the `config.json` of a Hugging Face checkpoint.

`transformers` fills in what sparse hub configs leave out, and reads both the hub's spelling and the one that
transformers 5 writes (`rope_parameters`, nested `text_config`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, LlavaConfig

from reroute_jax.errors import RerouteError


@dataclass(frozen=True)
class DecoderConfig:
    """A LLaMA-style decoder: RMSNorm, rotary positions, grouped-query attention, gated SiLU MLP."""

    vocab_size: int
    hidden_size: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    tied_head: bool


@dataclass(frozen=True)
class ClipConfig:
    """A CLIP vision transformer."""

    hidden_size: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    norm_eps: float
    activation: str

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of one image as (rows, columns)."""
        side = self.image_size // self.patch_size
        return side, side


@dataclass(frozen=True)
class ModelConfig:
    """A vision-language model. `feature_layer` indexes the tower's hidden states (0 = input of the first block)."""

    family: str
    decoder: DecoderConfig
    vision: ClipConfig
    feature_layer: int
    projector_bias: bool
    projector_activation: str
    image_token: int
    bos_token: int | None
    eos_tokens: tuple[int, ...]
    pad_token: int

    @classmethod
    def from_hf(cls, config: Mapping) -> ModelConfig:
        """Read a `config.json` that was parsed to a mapping.

        Raises RerouteError for an architecture or a setting that is not implemented.
        """
        family = config.get("model_type")
        if family != "llava":
            raise RerouteError(f"unknown architecture {family!r} in config.json: expected model_type 'llava'")
        try:
            hf = AutoConfig.for_model(**config)
        except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError) as problem:
            reason = " ".join(str(problem).split())
            raise RerouteError(f"config.json cannot be read ({reason}): restore it from the original") from problem
        return _from_llava(hf)

    @property
    def num_layers(self) -> int:
        return self.decoder.num_layers


def _from_llava(hf: LlavaConfig) -> ModelConfig:
    text, vision = hf.text_config, hf.vision_config
    _require("text_config.model_type", text.model_type, ("llama",))
    _require("text_config.hidden_act", text.hidden_act, ("silu",))
    _require("text_config.attention_bias", text.attention_bias, (False,))
    _require("text_config.mlp_bias", text.mlp_bias, (False,))
    _require("text_config.rope_parameters.rope_type", text.rope_parameters["rope_type"], ("default",))
    _require("vision_config.model_type", vision.model_type, ("clip_vision_model",))
    _require("vision_feature_select_strategy", hf.vision_feature_select_strategy, ("default",))
    _require("vision_feature_layer as one integer", isinstance(hf.vision_feature_layer, int), (True,))
    eos = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
    pads = [getattr(hf, "pad_token_id", None), text.pad_token_id, eos[0]]
    return ModelConfig(
        family="llava",
        decoder=DecoderConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            mlp_dim=text.intermediate_size,
            num_layers=text.num_hidden_layers,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim or text.hidden_size // text.num_attention_heads,
            rope_theta=float(text.rope_parameters["rope_theta"]),
            norm_eps=text.rms_norm_eps,
            tied_head=hf.tie_word_embeddings,
        ),
        vision=ClipConfig(
            hidden_size=vision.hidden_size,
            mlp_dim=vision.intermediate_size,
            num_layers=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            norm_eps=vision.layer_norm_eps,
            activation=vision.hidden_act,
        ),
        feature_layer=_hidden_state_index(hf.vision_feature_layer, vision.num_hidden_layers),
        projector_bias=hf.multimodal_projector_bias,
        projector_activation=hf.projector_hidden_act,
        image_token=hf.image_token_index,
        bos_token=text.bos_token_id,
        eos_tokens=tuple(token for token in eos if token is not None),
        pad_token=next(token for token in pads if token is not None),
    )


def _hidden_state_index(layer: int, num_layers: int) -> int:
    """HF counts hidden states: `num_layers + 1` of them, negative from the end."""
    return layer if layer >= 0 else num_layers + 1 + layer


def _require(name: str, value: object, supported: tuple) -> None:
    if value not in supported:
        raise RerouteError(f"config.json: {name} = {value!r} is not implemented, expected one of {list(supported)}")
