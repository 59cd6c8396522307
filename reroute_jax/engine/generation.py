"""Choosing tokens, and the compiled decode loop."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from reroute_jax.decoder import Decoder, decode_step
from reroute_jax.nn.cache import KVCache


@dataclass(frozen=True)
class Sampling:
    """How a token follows from logits. temperature 0: the most likely one, and `top_p` has no effect.

    repetition_penalty: divides positive and multiplies negative logits of every token in the prompt or the output so
    far, once each, before anything else (as transformers does). eos: ids that end a row; pad: what follows.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    eos: tuple[int, ...] = ()
    pad: int = 0


@jax.tree_util.register_dataclass
@dataclass
class DecodeState:
    """step: how many of `tokens` are chosen. seen: tokens the repetition penalty applies to."""

    step: Int[Array, ""]
    tokens: Int[Array, "B new"]
    done: Bool[Array, " B"]
    seen: Bool[Array, "B vocab"]
    key: PRNGKeyArray
    cache: KVCache


def decode(
    decoder: Decoder,
    logits: Float[Array, "B vocab"],
    cache: KVCache,
    seen: Bool[Array, "B vocab"],
    key: PRNGKeyArray,
    sampling: Sampling,
    max_new: int,
) -> tuple[Int[Array, "B new"], KVCache]:
    """Up to `max_new` tokens a row from the prefill's logits and cache; rows that end are filled with `pad`.

    The cache is returned because a donated buffer is only reused for an output.
    """
    batch = logits.shape[0]
    tokens = jnp.full((batch, max_new), sampling.pad, jnp.int32)
    start = DecodeState(jnp.int32(0), tokens, jnp.zeros(batch, bool), seen, key, cache)
    start = _append(start, logits, sampling)

    def unfinished(state: DecodeState) -> Bool[Array, ""]:
        return (state.step < max_new) & ~state.done.all()

    def advance(state: DecodeState) -> DecodeState:
        last = jax.lax.dynamic_index_in_dim(state.tokens, state.step - 1, axis=1, keepdims=False)
        logits, cache = decode_step(decoder, last, state.cache, state.step - 1)
        return _append(
            DecodeState(state.step, state.tokens, state.done, state.seen, state.key, cache), logits, sampling
        )

    final = jax.lax.while_loop(unfinished, advance, start)
    return final.tokens, final.cache


def _append(state: DecodeState, logits: Float[Array, "B vocab"], sampling: Sampling) -> DecodeState:
    key, draw = jax.random.split(state.key)
    token = jnp.where(state.done, sampling.pad, choose(logits, state.seen, draw, sampling))
    tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1)
    done = state.done | jnp.isin(token, jnp.array(sampling.eos, jnp.int32))
    seen = state.seen.at[jnp.arange(len(token)), token].set(True)
    return DecodeState(state.step + 1, tokens, done, seen, key, state.cache)


def choose(
    logits: Float[Array, "B vocab"], seen: Bool[Array, "B vocab"], key: PRNGKeyArray, sampling: Sampling
) -> Int[Array, " B"]:
    """One token a row."""
    if sampling.repetition_penalty != 1.0:
        penalised = jnp.where(logits < 0, logits * sampling.repetition_penalty, logits / sampling.repetition_penalty)
        logits = jnp.where(seen, penalised, logits)
    if sampling.temperature == 0:
        return logits.argmax(axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        logits = jnp.where(_nucleus(logits, sampling.top_p), logits, -jnp.inf)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def _nucleus(logits: Float[Array, "B vocab"], top_p: float) -> Bool[Array, "B vocab"]:
    """The smallest set of most likely tokens whose probability reaches `top_p`, at least one."""
    order = jnp.argsort(-logits, axis=-1)
    sorted_probabilities = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    before = jnp.cumsum(sorted_probabilities, axis=-1) - sorted_probabilities
    rows = jnp.arange(len(logits))[:, None]
    return jnp.zeros(logits.shape, bool).at[rows, order].set(before < top_p)
