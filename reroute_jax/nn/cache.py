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
from jaxtyping import Array, Bool, Float, Int, Int8

from reroute_jax.config import DecoderConfig
from reroute_jax.nn.sharding import per_device

# Keys, and values, that some layers leave of a prompt, without room for more.
Cached = tuple[tuple[Float[Array, "B K T H"], ...], tuple[Float[Array, "B K T H"], ...]]

# Slots behind the prompt that a prefill leaves free. Longer answers grow the cache, so no program depends on a limit.
ROOM = 32
# What a cache may hold instead of numbers in the model's dtype.
KINDS = ("int8",)
_LEVELS = 127


@jax.tree_util.register_dataclass
@dataclass
class Int8Rows:
    """Keys or values of a layer in 8 bits, `numbers * scales`: symmetric, and each token of each head has a scale.

    Scales are fp32 whatever the model's dtype: of a head of 128 they are 3% of its bytes, in bf16 1.5%, and those of
    fp16 would end where a row's largest number is below 0.008.
    """

    numbers: Int8[Array, "B K S H"]
    scales: Float[Array, "B K S"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.numbers.shape

    @property
    def ndim(self) -> int:
        return self.numbers.ndim


# Keys or values of a layer, as a cache holds them.
KVRows = Float[Array, "B K _ H"] | Int8Rows


@jax.tree_util.register_dataclass
@dataclass
class StageCache:
    """Keys and values of one stage's layers. length: tokens each row holds. next_position: rotary position of the
    token that a row is fed next."""

    keys: tuple[KVRows, ...]
    values: tuple[KVRows, ...]
    length: Int[Array, " B"]
    next_position: Int[Array, " B"]

    @classmethod
    def of(
        cls, cached: Cached, kind: str | None, length: Int[Array, " B"], next_position: Int[Array, " B"]
    ) -> StageCache:
        """What layers left of a prompt, and ROOM more slots. kind: of KINDS; None keeps the dtype."""
        held = (tuple(with_room(rows if kind is None else int8_rows(rows), ROOM) for rows in part) for part in cached)
        return cls(*held, length=length, next_position=next_position)

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
        """Of all keys and values as allocated, scales among them."""
        arrays = jax.tree.leaves([(stage.keys, stage.values) for stage in self.stages])
        return sum(array.size * array.dtype.itemsize for array in arrays)


def token_bytes(config: DecoderConfig, dtype: str) -> int:
    """Of the key and the value of one token in one layer. dtype: the model's."""
    dim = config.head_dim
    of_head = dim * jnp.dtype(dtype).itemsize if config.kv_cache is None else dim + jnp.dtype(jnp.float32).itemsize
    return 2 * config.num_kv_heads * of_head


def int8_rows(x: Float[Array, "B K S H"]) -> Int8Rows:
    """Rounded to the nearest of 255 numbers, the largest of a row being 127: no number is off by more than half a
    scale."""
    wide = x.astype(jnp.float32)
    scales = jnp.abs(wide).max(axis=-1) / _LEVELS
    scales = jnp.where(scales == 0, 1, scales)  # of a row of zeros
    return Int8Rows(jnp.round(wide / scales[..., None]).astype(jnp.int8), scales)


def with_room(x: KVRows, slots: int) -> KVRows:
    """Append empty slots."""
    return jax.tree.map(lambda part: jnp.pad(part, [(0, slots if axis == 2 else 0) for axis in range(part.ndim)]), x)


def grown(cache: KVCache, slots: int) -> KVCache:
    """The same cache with `slots` more of room in every layer."""

    def stage(old: StageCache) -> StageCache:
        longer = {name: tuple(with_room(rows, slots) for rows in getattr(old, name)) for name in ("keys", "values")}
        return replace(old, **longer)

    return KVCache(tuple(stage(old) for old in cache.stages))


def write_slots(cache: KVRows, new: Float[Array, "B K 1 H"], slots: Int[Array, " B"]) -> KVRows:
    """Write one token a row, at the row's own slot."""
    return per_device(_write_slots, cache, int8_rows(new) if isinstance(cache, Int8Rows) else new, slots)


def write_rows(
    cache: Float[Array, "B K T H"], new: Float[Array, "B K S H"], slots: Int[Array, "B S"]
) -> Float[Array, "B K T H"]:
    """Write several tokens a row, at ascending slots of its own; slots out of range are dropped."""
    promised = {"mode": "drop", "indices_are_sorted": True, "unique_indices": True}
    return jax.vmap(lambda row, tokens, own: row.at[:, own].set(tokens.astype(cache.dtype), **promised))(
        cache, new, slots
    )


def _write_slots(cache, new, slots: Int[Array, " B"]) -> KVRows:
    rows = jnp.arange(len(slots))
    promised = {"unique_indices": True, "indices_are_sorted": True, "mode": "promise_in_bounds"}

    def write(held: Array, one: Array) -> Array:
        return held.at[rows, :, slots].set(one[:, :, 0].astype(held.dtype), **promised)

    return jax.tree.map(write, cache, new)
