"""A decoder without a cache: logits of all positions in one program."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from reroute_jax.decoder import Decoder, forward
from reroute_jax.nn.positions import rope_tables


def all_logits(
    decoder: Decoder, ids: np.ndarray, positions: np.ndarray, visual: np.ndarray, *features: np.ndarray
) -> np.ndarray:
    """Of one prompt. features: `[n, D]` of the slots `visual`; behind the first what DeepStack adds there."""

    @jax.jit
    def run(features: Sequence[jax.Array]) -> jax.Array:
        x = decoder.embed(jnp.asarray(ids)[None])
        own, *added = (jnp.zeros_like(x).at[0, visual].set(part) for part in features)
        x = jnp.where(jnp.isin(jnp.arange(len(ids)), visual)[:, None], own, x)
        rope, causal = rope_tables(jnp.asarray(positions), decoder.config), jnp.tri(len(ids), dtype=bool)[None]
        return decoder.logits(forward(decoder, x, rope, causal, added))

    return np.asarray(run(features))
