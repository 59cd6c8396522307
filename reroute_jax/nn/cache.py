"""The KV cache: one physical length per stage, which is where routing saves memory.

A ragged batch of two rows after prefill (t text, v visual, _ room), and after each has decoded two tokens (n):

    row 0   t v v t t _ _ _ _        t v v t t n n _ _
    row 1   t v v t _ _ _ _ _        t v v t n n _ _ _

Valid slots stand first in every row, so that `length` says both what a row may read and where it writes next. A row
that is done stands still while others go on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from reroute_jax.nn.sharding import per_device

# Keys, and values, that some layers leave of a prompt, without room for more.
Cached = tuple[tuple[Float[Array, "B K T H"], ...], tuple[Float[Array, "B K T H"], ...]]

# Slots behind the prompt that a prefill leaves free. Longer answers grow the cache, so no program depends on a limit.
ROOM = 32


@jax.tree_util.register_dataclass
@dataclass
class StageCache:
    """Keys and values of one stage's layers. length: tokens each row holds. next_position: rotary position of the
    token that a row is fed next."""

    keys: tuple[Float[Array, "B K S H"], ...]
    values: tuple[Float[Array, "B K S H"], ...]
    length: Int[Array, " B"]
    next_position: Int[Array, " B"]

    @property
    def visible(self) -> Bool[Array, "B S"]:
        """Slots that the next token may read, the one it is written to included."""
        return jnp.arange(self.keys[0].shape[2]) <= self.length[:, None]

    def advanced(self, keys, values, live: Bool[Array, " B"]) -> StageCache:
        """The stage after a step that wrote `keys` and `values`; rows that are not live stand still."""
        step = live.astype(jnp.int32)
        return StageCache(keys, values, self.length + step, self.next_position + step)


@jax.tree_util.register_dataclass
@dataclass
class KVCache:
    stages: tuple[StageCache, ...]

    def tokens_per_layer(self) -> Int[Array, "B L"]:
        """Tokens each layer holds for each row."""
        counts = [jnp.tile(stage.length[:, None], (1, len(stage.keys))) for stage in self.stages]
        return jnp.concatenate(counts, axis=1)

    @property
    def nbytes(self) -> int:
        """Of all keys and values as allocated."""
        arrays = [array for stage in self.stages for array in (*stage.keys, *stage.values)]
        return sum(array.size * array.dtype.itemsize for array in arrays)


def with_room(x: Float[Array, "B K S H"], slots: int) -> Float[Array, "B K S_new H"]:
    """Append empty slots."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, slots), (0, 0)))


def grown(cache: KVCache, slots: int) -> KVCache:
    """The same cache with `slots` more of room in every layer."""

    def stage(old: StageCache) -> StageCache:
        longer = {name: tuple(with_room(array, slots) for array in getattr(old, name)) for name in ("keys", "values")}
        return replace(old, **longer)

    return KVCache(tuple(stage(old) for old in cache.stages))


def write_slots(
    cache: Float[Array, "B K S H"], new: Float[Array, "B K 1 H"], slots: Int[Array, " B"]
) -> Float[Array, "B K S H"]:
    """Write one token a row, at the row's own slot."""
    return per_device(_write_slots, cache, new, slots)


def write_rows(
    cache: Float[Array, "B K T H"], new: Float[Array, "B K S H"], slots: Int[Array, "B S"]
) -> Float[Array, "B K T H"]:
    """Write several tokens a row, at ascending slots of its own; slots out of range are dropped."""
    promised = {"mode": "drop", "indices_are_sorted": True, "unique_indices": True}
    return jax.vmap(lambda row, tokens, own: row.at[:, own].set(tokens.astype(cache.dtype), **promised))(
        cache, new, slots
    )


def _write_slots(cache, new, slots: Int[Array, " B"]) -> Float[Array, "B K S H"]:
    rows = jnp.arange(len(slots))
    return cache.at[rows, :, slots].set(
        new[:, :, 0].astype(cache.dtype), unique_indices=True, indices_are_sorted=True, mode="promise_in_bounds"
    )
