"""Rotary tables from position ids."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int

from reroute_jax.config import DecoderConfig
from reroute_jax.layers import Rope


def rope_tables(positions: Int[Array, "B T"], config: DecoderConfig) -> Rope:
    """cos and sin of `position * theta^(-2i/H)`, `[B, T, H/2]`, fp32."""
    half = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32)
    frequencies = 1.0 / config.rope_theta ** (half / config.head_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return Rope(jnp.cos(angles), jnp.sin(angles))
