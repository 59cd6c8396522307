"""Device work on a fixed number of slots: answers enter free ones, and those in use decode.

All shapes are static. The buffers of a pool are donated to every program and come back, so they stay where they are.
Letters: B slots of a pool; R rows of a prefill; U slots that take part in a segment.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from reroute_jax.engine import generation
from reroute_jax.engine.compilation import compiled
from reroute_jax.engine.generation import DecodeState
from reroute_jax.engine.sampling import RowSampling
from reroute_jax.nn.cache import ROOM, KVCache, grown
from reroute_jax.nn.weights import Weights
from reroute_jax.types import AnyArray

log = logging.getLogger("reroute_jax")

# Of each row: tokens and log-probabilities as of `Chosen`; whether it is done; whether all its logits were finite.
Told = tuple[Int[Array, "R steps"], Float[Array, "R steps"], Bool[Array, " R"], Bool[Array, " R"]]

# Of indices that are slots of a pool.
_SLOTS = {"indices_are_sorted": True, "unique_indices": True, "mode": "promise_in_bounds"}


@compiled(static_argnames=("slots", "room"), keep_unused=True)
def empty_pool(logits: Float[Array, "R vocab"], cache: KVCache, slots: int, room: int) -> DecodeState:
    """Slots for rows of a prefill like this one and `room >= ROOM` more tokens, all of them free.

    They lie where the prefill lies, of which nothing but shapes is used: as the slots that other programs return, so
    that none of these is compiled for either.
    """
    log.info("compiling %d empty slots with room for %d tokens", slots, room)

    def zeros(array: Array) -> Array:
        return jnp.zeros((slots, *array.shape[1:]), array.dtype)

    nothing = jnp.zeros(slots, jnp.int32)
    all_of_them = jnp.ones(slots, bool)
    seen = jnp.zeros((slots, logits.shape[1]), bool)
    held = grown(jax.tree.map(zeros, cache), room - ROOM)
    return DecodeState(nothing, nothing, done=all_of_them, finite=all_of_them, seen=seen, cache=held)


@compiled(donate_argnames="pool")
def admit(
    pool: DecodeState,
    logits: Float[Array, "R vocab"],
    cache: KVCache,
    seen: Bool[AnyArray, "R vocab"],
    live: Bool[AnyArray, " R"],
    sampling: RowSampling,
    slots: Int[AnyArray, " R"],
) -> tuple[DecodeState, Told]:
    """The rows of a prefill in `slots` of the pool, ascending, with their first tokens."""
    log.info("compiling the entry of %d rows into %d slots", len(live), len(pool.token))
    state, chosen = generation.begin(logits, cache, seen, live, sampling)

    def put(held: Array, new: Array) -> Array:
        return held.at[slots, *(slice(size) for size in new.shape[1:])].set(new, **_SLOTS)

    return jax.tree.map(put, pool, state), (chosen.tokens, chosen.logprobs, state.done, state.finite)


@compiled(donate_argnames="pool")
def advance(
    decoder: Weights,
    pool: DecodeState,
    sampling: RowSampling,
    slots: Int[AnyArray, " U"],
    running: Bool[AnyArray, " U"],
    steps: Int[AnyArray, ""],
) -> tuple[DecodeState, Told]:
    """Up to `steps` more tokens of the rows in `slots`, ascending, that are `running`; the others fill up and stand
    still. All of a pool's slots are its arrays as they are, and nothing is gathered."""
    log.info("compiling decode for %d of %d slots", len(slots), len(pool.token))
    whole = len(slots) == len(pool.token)
    state = pool if whole else jax.tree.map(lambda held: held.at[slots].get(**_SLOTS), pool)
    state = replace(state, done=state.done | ~running)
    state, chosen = generation.decode(decoder.module, state, sampling, steps)
    after = state if whole else jax.tree.map(lambda held, new: held.at[slots].set(new, **_SLOTS), pool, state)
    return after, (chosen.tokens, chosen.logprobs, state.done, state.finite)
