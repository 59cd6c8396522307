"""Frozen model configurations, and what the families' readers of a checkpoint's `config.json` share.

A family's reader (`read_config` of its file in `models/`) gets the file as `transformers` understands it, which fills
in what sparse hub configs leave out and reads both the hub's spelling and its own (`rope_parameters`, nested
`text_config`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from reroute_jax.errors import RerouteError


@dataclass(frozen=True)
class DecoderConfig:
    """A LLaMA-style decoder: RMSNorm, rotary positions, grouped-query attention, gated SiLU MLP.

    rope_sections: rotary pairs that turn with the temporal, vertical and horizontal position (M-RoPE); empty where a
    token has one position. rope_interleaved: whether neighbouring pairs turn with different ones (`positions.py`).
    qk_norm: whether each head's queries and keys are normalised before they are rotated. deepstack: of how many layers,
    the first ones, the output gets further image features added at visual tokens (DeepStack, arXiv 2406.04334).
    kv_cache: a dtype that the KV cache has of its own, of `cache.KINDS`; the loader sets it, no checkpoint names one.
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
    rope_interleaved: bool = False
    qk_norm: bool = False
    deepstack: int = 0
    kv_cache: str | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A vision-language model. family: its name in `models.FAMILIES`. vision: sizes of the tower, a frozen dataclass of
    the family's own. repetition_penalty: what the family generates with unless told otherwise.

    Of the Qwen families: video_token, which is refused; pixel_limits, fewest and most pixels of an image, None for
    those of the checkpoint's image processor. Of Qwen2.5-VL alone: mrope_compat, whose rotary positions to reproduce
    (`mrope.py`), and temporal_rate, temporal positions a second of video, which that needs. Of LLaVA alone:
    vicuna_system, whether a prompt opens with Vicuna's system sentence.
    """

    family: str
    decoder: DecoderConfig
    vision: Any
    image_token: int
    bos_token: int | None
    eos_tokens: tuple[int, ...]
    pad_token: int | None
    repetition_penalty: float = 1.0
    video_token: int | None = None
    temporal_rate: int | None = None
    mrope_compat: str | None = None
    pixel_limits: tuple[int, int] | None = None
    vicuna_system: bool = False

    @property
    def num_layers(self) -> int:
        return self.decoder.num_layers


def decoder_config(text, *, qkv_bias: bool, rope_sections: tuple[int, ...], tied_head: bool) -> DecoderConfig:
    """The decoder of a `text_config` as transformers reads it. Raises RerouteError for another activation than SiLU and
    a base of rotary angles that is none."""
    require("text_config.hidden_act", text.hidden_act, ("silu",))
    theta = float(text.rope_parameters["rope_theta"])
    if not 1 < theta < math.inf:
        raise RerouteError(f"config.json: rope_theta is {theta:g}, expected a finite number above 1")
    return DecoderConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        mlp_dim=text.intermediate_size,
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        rope_theta=theta,
        norm_eps=text.rms_norm_eps,
        qkv_bias=qkv_bias,
        rope_sections=rope_sections,
        tied_head=tied_head,
    )


# What a generation_config.json may hold that changes which token is the most likely: nothing, or 1 in the first ones.
_FACTORS = ("num_beams", "num_beam_groups", "encoder_repetition_penalty", "guidance_scale")
_UNFOLLOWED = (
    *_FACTORS,
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens", "suppress_tokens"),
    *("begin_suppress_tokens", "bad_words_ids", "force_words_ids", "forced_bos_token_id", "forced_eos_token_id"),
    *("sequence_bias", "exponential_decay_length_penalty", "constraints", "penalty_alpha", "dola_layers"),
    *("watermarking_config", "stop_strings"),
)


def with_generation(config: ModelConfig, generation: Mapping) -> ModelConfig:
    """Stop tokens, pad token and repetition penalty of a generation_config.json; null says as little as a missing key.

    Raises RerouteError for values that cannot be, for settings that would change greedy answers and are not
    implemented, and where neither file names a stop token.
    """
    for name in _UNFOLLOWED:
        if generation.get(name) and not (name in _FACTORS and generation[name] == 1):
            raise RerouteError(
                f"generation_config.json: {name} = {generation[name]!r} is not implemented, and answers would differ: "
                "take it out to do without it"
            )
    penalty, pad = generation.get("repetition_penalty"), generation.get("pad_token_id")
    stops = token_ids(generation.get("eos_token_id")) or config.eos_tokens
    if not stops:
        raise RerouteError(
            "neither generation_config.json nor config.json names a stop token: set eos_token_id in one of them"
        )
    pad = (stops[0] if config.pad_token is None else config.pad_token) if pad is None else pad
    pad = stops[0] if pad == config.image_token else pad  # or rows that fill a batch up would hold images
    for name, token in [*(("eos_token_id", stop) for stop in stops), ("pad_token_id", pad)]:
        if type(token) is not int or not 0 <= token < config.decoder.vocab_size:
            raise RerouteError(f"{name} is {token!r}, expected ids from 0 to {config.decoder.vocab_size - 1}")
    penalty = config.repetition_penalty if penalty is None else penalty
    if type(penalty) not in (int, float) or not 0 < penalty < math.inf:
        raise RerouteError(f"generation_config.json: repetition_penalty is {penalty!r}, expected a number above 0")
    return replace(config, eos_tokens=stops, pad_token=pad, repetition_penalty=float(penalty))


def token_ids(ids: Any) -> tuple[Any, ...]:
    """One id, several or none, as config.json has them."""
    return tuple(ids) if isinstance(ids, list) else (() if ids is None else (ids,))


def require(name: str, value: object, supported: tuple) -> None:
    """Raises RerouteError naming the supported values unless the setting `name` of config.json has one of them."""
    if value not in supported:
        raise RerouteError(f"config.json: {name} = {value!r} is not implemented, expected one of {list(supported)}")
