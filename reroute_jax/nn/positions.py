"""Rotary tables from position ids."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from reroute_jax.config import DecoderConfig
from reroute_jax.nn.layers import Rope


def rope_tables(positions: Int[Array | np.ndarray, "*channels B T"], config: DecoderConfig) -> Rope:
    """cos and sin of `position * theta^(-2i/H)`, `[B, T, H/2]`, fp32.

    Positions `[3, B, T]` are temporal, vertical and horizontal; each turns its own section of the rotary pairs (M-RoPE,
    arXiv 2409.12191, section 2.1). Positions `[B, T]` turn all pairs.
    """
    half = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32)
    frequencies = 1.0 / config.rope_theta ** (half / config.head_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    if positions.ndim == 3:
        edges = np.cumsum(config.rope_sections)[:-1]
        channels = [part[c] for c, part in enumerate(jnp.split(angles, edges, axis=-1))]
        angles = jnp.concatenate(channels, axis=-1)
    return Rope(jnp.cos(angles), jnp.sin(angles))
