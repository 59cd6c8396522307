"""The compiled decode loop: a segment of tokens at a time, on rows that each stand where they stand.

How long an answer may become is a number in an array. What is compiled is a segment of up to `SEGMENT` steps on caches
of a few sizes; the host goes on while a row is unfinished (`segments.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from reroute_jax.decoder import Decoder, decode_step
from reroute_jax.engine.sampling import RowSampling, choose
from reroute_jax.nn.cache import ROOM, KVCache, grown
from reroute_jax.types import AnyArray

SEGMENT = ROOM


@jax.tree_util.register_dataclass
@dataclass
class DecodeState:
    """token: chosen last, which the caches do not hold yet. produced: tokens of the answer so far. seen: tokens the
    repetition penalty applies to. finite: whether all logits of the row were finite numbers."""

    token: Int[Array, " B"]
    produced: Int[Array, " B"]
    done: Bool[Array, " B"]
    finite: Bool[Array, " B"]
    seen: Bool[Array, "B vocab"]
    cache: KVCache


@jax.tree_util.register_dataclass
@dataclass
class Chosen:
    """Tokens in order, -1 where a row was done, and the model's own log-probability of each (temperature 1, no
    penalty)."""

    tokens: Int[Array, "B steps"]
    logprobs: Float[Array, "B steps"]


def begin(
    logits: Float[Array, "B vocab"],
    cache: KVCache,
    seen: Bool[AnyArray, "B vocab"],
    live: Bool[AnyArray, " B"],
    sampling: RowSampling,
) -> tuple[DecodeState, Chosen]:
    """The first token of each row, from a prefill. Rows that are not `live` fill a batch up and are done."""
    nothing = jnp.zeros(len(live), jnp.int32)
    state = DecodeState(nothing, nothing, ~live, jnp.ones(len(live), bool), seen, cache)
    state, token, logprob = _append(state, logits, sampling)
    return state, Chosen(token[:, None], logprob[:, None])


def decode(
    decoder: Decoder, state: DecodeState, sampling: RowSampling, steps: Int[Array, ""]
) -> tuple[DecodeState, Chosen]:
    """Up to `steps` more tokens a row, `steps <= SEGMENT`; stops early where every row is done.

    The caches must have room for as many. They come back in the state: a donated buffer is only reused for an output.
    """
    batch = len(state.token)
    empty = Chosen(jnp.full((batch, SEGMENT), -1, jnp.int32), jnp.zeros((batch, SEGMENT)))

    def unfinished(carry) -> Bool[Array, ""]:
        step, state, _ = carry
        return (step < steps) & ~state.done.all()

    def advance(carry):
        step, state, chosen = carry
        logits, cache = decode_step(decoder, state.token, state.cache, ~state.done)
        state, token, logprob = _append(replace(state, cache=cache), logits, sampling)
        return step + 1, state, Chosen(_put(chosen.tokens, token, step), _put(chosen.logprobs, logprob, step))

    _, state, chosen = jax.lax.while_loop(unfinished, advance, (jnp.int32(0), state, empty))
    return state, chosen


def keep_rows(
    state: DecodeState, sampling: RowSampling, rows: Int[Array, "shards kept"], slots: int
) -> tuple[DecodeState, RowSampling]:
    """Only some rows of a batch, with `slots` more of room (static). rows: of each of the equal parts that the batch is
    split into, counted within it, so that no row leaves its devices."""

    def kept(array: Array) -> Array:
        parts = array.reshape(len(rows), -1, *array.shape[1:])
        return jax.vmap(lambda part, index: part[index])(parts, rows).reshape(rows.size, *array.shape[1:])

    state, sampling = jax.tree.map(kept, (state, sampling))
    return replace(state, cache=grown(state.cache, slots)), sampling


def _append(
    state: DecodeState, logits: Float[Array, "B vocab"], sampling: RowSampling
) -> tuple[DecodeState, Int[Array, " B"], Float[Array, " B"]]:
    """The state with one more token in every row that is not done, and these tokens with their log-probabilities."""
    token = choose(logits, state.seen, state.produced, sampling)
    live = ~state.done
    logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
    produced = state.produced + live
    ended = (token[:, None] == sampling.stop).any(axis=1) | (produced >= sampling.limit)
    following = DecodeState(
        token=token,
        produced=produced,
        done=state.done | ended,
        finite=state.finite & (state.done | jnp.isfinite(logits).all(axis=-1)),
        seen=state.seen.at[jnp.arange(len(token)), token].set(True),
        cache=state.cache,
    )
    return following, jnp.where(live, token, -1), jnp.where(live, logprob, 0)


def _put(columns: Array, column: Array, at: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(columns, column[:, None], at, axis=1)
