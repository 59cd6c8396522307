"""Rotary tables from position ids."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from reroute_jax.config import DecoderConfig
from reroute_jax.nn.layers import Rope


def rope_tables(positions: Int[Array | np.ndarray, "*channels B T"], config: DecoderConfig) -> Rope:
    """cos and sin of `position * theta^(-2i/H)`, `[B, T, H/2]`, fp32.

    Positions `[3, B, T]` are temporal, vertical and horizontal; each turns its own rotary pairs: a section of them
    (M-RoPE, arXiv 2409.12191, section 2.1), or those of `interleaved_channels`. Positions `[B, T]` turn all pairs.
    """
    half = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32)
    frequencies = 1.0 / config.rope_theta ** (half / config.head_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    if positions.ndim == 3:
        join = _interleaved if config.rope_interleaved else _in_sections
        angles = join(angles, config.rope_sections)
    return Rope(jnp.cos(angles), jnp.sin(angles))


def interleaved_channels(sections: Sequence[int], pairs: int) -> Int[np.ndarray, " pairs"]:
    """Which position turns each rotary pair in Qwen3-VL (transformers' `qwen3_vl`): 0 1 2 0 1 2 ..., where the vertical
    (1) and the horizontal one (2) end after as many pairs as their section says, and the temporal one takes the rest.
    """
    pair = np.arange(pairs)
    channel = pair % 3
    return np.where(pair < 3 * np.array(sections)[channel], channel, 0)


def _in_sections(angles: Float[Array, "3 B T half"], sections: Sequence[int]) -> Float[Array, "B T half"]:
    edges = np.cumsum(sections)[:-1]
    return jnp.concatenate([part[c] for c, part in enumerate(jnp.split(angles, edges, axis=-1))], axis=-1)


def _interleaved(angles: Float[Array, "3 B T half"], sections: Sequence[int]) -> Float[Array, "B T half"]:
    channel = interleaved_channels(sections, angles.shape[-1])
    return jnp.select([channel == 1, channel == 2], [angles[1], angles[2]], angles[0])
