"""How a token follows from logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from reroute_jax.buckets import MOST_NEW_TOKENS
from reroute_jax.errors import RerouteError
from reroute_jax.types import AnyArray

# What programs take in fp32: a smaller one is 0 there, a larger one infinite.
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Sampling:
    """What a caller asks for.

    temperature: 0 takes the most likely token, and `top_p` has no effect. top_p: draws come from the smallest set of
    most likely tokens whose probability reaches it. repetition_penalty: divides positive and multiplies negative logits
    of every token in the prompt or the output so far, once each, before anything else (as transformers does). stop: ids
    that end an answer. limit: tokens of an answer at most. Raises RerouteError for numbers that mean nothing.
    """

    temperature: float | int = 0.0
    top_p: float | int = 1.0
    repetition_penalty: float | int = 1.0
    stop: tuple[int, ...] = ()
    limit: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        finite = f"up to {_LARGEST:.2g}, as float32 holds it"
        _check("temperature", self.temperature, Real, lambda given: 0 <= given <= _LARGEST, f"a number from 0 {finite}")
        _check("top_p", self.top_p, Real, lambda given: 0 < given <= 1, "a number above 0 and up to 1")
        penalty, positive = self.repetition_penalty, f"a number above 0, from {_SMALLEST:.2g} {finite}"
        _check("repetition_penalty", penalty, Real, lambda given: _SMALLEST <= given <= _LARGEST, positive)
        limits = f"a whole number from 1 to {MOST_NEW_TOKENS}"
        _check("max_new_tokens", self.limit, Integral, lambda given: 1 <= given <= MOST_NEW_TOKENS, limits)
        _check("seed", self.seed, Integral, lambda given: 0 <= given < 2**32, "a whole number from 0 to 4294967295")
        for token in self.stop:
            _check("a stop id", token, Integral, lambda given: 0 <= given < 2**31, "ids of tokens")


def _check(name: str, value: Any, kind: type, right: Callable[[Any], bool], expected: str) -> None:
    if not isinstance(value, kind) or isinstance(value, bool) or not right(value):
        raise RerouteError(f"{name} is {value!r}, expected {expected}")


@jax.tree_util.register_dataclass
@dataclass
class RowSampling:
    """`Sampling` of every row as arrays, so that no value of it compiles anything. stop: padded with -1. draws: static,
    whether any row has a temperature above 0; greedy answers need not wait until the code that draws is compiled.

    seed, number: make the row's own key; number is that of its question in the call. What is drawn then depends neither
    on the batch nor on its size.
    """

    temperature: Float[AnyArray, " B"]
    top_p: Float[AnyArray, " B"]
    repetition_penalty: Float[AnyArray, " B"]
    stop: Int[AnyArray, "B E"]
    limit: Int[AnyArray, " B"]
    seed: UInt32[AnyArray, " B"]
    number: Int[AnyArray, " B"]
    draws: bool = field(metadata={"static": True})


_STOP_SLOTS = 8


def row_sampling(sampling: Sampling, numbers: Sequence[int]) -> RowSampling:
    """The same for every row. numbers: of the questions that the rows hold."""
    slots = -(-max(1, len(sampling.stop)) // _STOP_SLOTS) * _STOP_SLOTS
    # Below fp32's smallest normal number a temperature, or a share, is that of the most likely token.
    temperature = sampling.temperature if sampling.temperature >= _SMALLEST else 0
    top_p = max(sampling.top_p, _SMALLEST)
    stop = [*sampling.stop, *[-1] * (slots - len(sampling.stop))]
    rows = len(numbers)
    return RowSampling(
        np.full(rows, temperature, np.float32),
        np.full(rows, top_p, np.float32),
        np.full(rows, sampling.repetition_penalty, np.float32),
        np.tile(np.array(stop, np.int32), (rows, 1)),
        np.full(rows, sampling.limit, np.int32),
        np.full(rows, sampling.seed, np.uint32),
        np.array(numbers, np.int32),
        draws=temperature > 0,
    )


def choose(
    logits: Float[Array, "B vocab"], seen: Bool[Array, "B vocab"], produced: Int[Array, " B"], sampling: RowSampling
) -> Int[Array, " B"]:
    """One token a row. produced: how many tokens the row's answer has; with the row's key it decides the draw."""
    penalty = sampling.repetition_penalty[:, None]
    penalised = jnp.where(logits < 0, logits * penalty, logits / penalty)
    logits = jnp.where(seen & (penalty != 1), penalised, logits)
    greedy = logits.argmax(axis=-1).astype(jnp.int32)
    return _drawn(logits, greedy, produced, sampling) if sampling.draws else greedy


def _drawn(
    logits: Float[Array, "B vocab"], greedy: Int[Array, " B"], produced: Int[Array, " B"], sampling: RowSampling
) -> Int[Array, " B"]:
    """Drawn in the rows with a temperature above 0; where there is none, nothing is computed."""
    hot = sampling.temperature > 0

    def drawn() -> Int[Array, " B"]:
        return jnp.where(hot, _draws(logits, hot, produced, sampling), greedy)

    return jax.lax.cond(hot.any(), drawn, lambda: greedy)


def _draws(
    logits: Float[Array, "B vocab"], hot: Bool[AnyArray, " B"], produced: Int[Array, " B"], sampling: RowSampling
) -> Int[Array, " B"]:
    # From the largest logit down: the quotient then overflows to minus infinity at most.
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / jnp.where(hot, sampling.temperature, 1)[:, None]
    scaled = jax.lax.cond((sampling.top_p < 1).any(), lambda: _nucleus(scaled, sampling.top_p), lambda: scaled)
    return jax.vmap(_draw)(sampling.seed, sampling.number, produced, scaled)


def _draw(seed, number, count, logits: Float[Array, " vocab"]) -> Int[Array, ""]:
    key = jax.random.key(seed)
    for part in (number, count):
        key = jax.random.fold_in(key, part)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def _nucleus(logits: Float[Array, "B vocab"], top_p: Float[AnyArray, " B"]) -> Float[Array, "B vocab"]:
    """The logits of the smallest set of most likely tokens whose probability reaches `top_p`, at least one; minus
    infinity elsewhere."""
    order = jnp.argsort(-logits, axis=-1)
    sorted_probabilities = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    before = jnp.cumsum(sorted_probabilities, axis=-1) - sorted_probabilities
    rows = jnp.arange(len(logits))[:, None]
    # In fp32 the sum in front of the last tokens can exceed 1: at a top_p of 1 nothing is left out.
    inside = (before < top_p[:, None]) | (top_p == 1)[:, None]
    return jnp.where(jnp.zeros(logits.shape, bool).at[rows, order].set(inside), logits, -jnp.inf)
