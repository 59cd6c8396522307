"""The KV cache: one physical length per stage, which is where routing saves memory.

A ragged batch of two rows after prefill, `max_new = 2` (t text, v visual, . unused, _ reserved for new tokens):

    row 0   t v v t t _ _
    row 1   t v v t . _ _

Valid prompt slots stand first. New tokens are written behind the longest row, at the same slot in every row, and
`valid` hides what lies between.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass
class StageCache:
    """Keys and values of one stage's layers. `valid` covers the prompt slots; `next_position` is a row's first
    decode position."""

    keys: tuple[Float[Array, "B K S H"], ...]
    values: tuple[Float[Array, "B K S H"], ...]
    valid: Bool[Array, "B P"]
    next_position: Int[Array, " B"]

    def visible(self, step: Int[Array, ""]) -> Bool[Array, "B S"]:
        """Slots that decode step `step` may read, its own included."""
        batch, prompt = self.valid.shape
        new = self.keys[0].shape[2] - prompt
        written = jnp.broadcast_to(jnp.arange(new) <= step, (batch, new))
        return jnp.concatenate([self.valid, written], axis=1)


@jax.tree_util.register_dataclass
@dataclass
class KVCache:
    stages: tuple[StageCache, ...]

    def tokens_per_layer(self) -> Int[Array, "B L"]:
        """Prompt tokens each layer holds for each row."""
        counts = [jnp.tile(stage.valid.sum(axis=1)[:, None], (1, len(stage.keys))) for stage in self.stages]
        return jnp.concatenate(counts, axis=1)


def with_room(x: Float[Array, "B K S H"], new: int) -> Float[Array, "B K S_new H"]:
    """Append `new` empty slots."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, new), (0, 0)))
