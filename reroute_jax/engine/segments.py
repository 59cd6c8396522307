"""The host's side of decoding: segment after segment while a row is unfinished, on caches that grow as answers do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Bool, Int

from reroute_jax.decoder import Prefilled
from reroute_jax.engine import programs
from reroute_jax.engine.generation import SEGMENT
from reroute_jax.engine.sampling import RowSampling
from reroute_jax.nn.cache import ROOM
from reroute_jax.nn.sharding import row_shards
from reroute_jax.nn.weights import Weights


@dataclass(frozen=True)
class Segment:
    """What some rows of a batch chose. rows: their numbers, `[R]`. tokens, logprobs: `[R, steps]`, -1 behind the end of
    an answer. done, finite: `[R]`, as of `DecodeState`."""

    rows: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray
    done: np.ndarray
    finite: np.ndarray


def decode_segments(
    decoder: Weights,
    prefilled: Prefilled,
    seen: np.ndarray,
    live: np.ndarray,
    sampling: RowSampling,
    steps: int = SEGMENT,
) -> Iterator[Segment]:
    """The answers of a batch, first tokens first, then up to `steps` tokens at a time, `steps <= SEGMENT`.

    The cache of `prefilled` is used up. Where its room is, a cache doubles it; there a batch also drops rows that are
    done, as far as a power of two of them is left on each device, so that shapes change at few places.
    """
    shards = row_shards(prefilled.logits, len(live))
    state, chosen = programs.begin(prefilled.logits, prefilled.cache, seen, live, sampling)
    rows, room, used = np.arange(len(live)), ROOM, 0
    while True:
        done, finite, tokens, logprobs = jax.device_get((state.done, state.finite, chosen.tokens, chosen.logprobs))
        yield Segment(rows, tokens, logprobs, done, finite)
        if done.all():
            return
        if used == room:
            kept = _kept(done.reshape(shards, -1))
            state, sampling = programs.keep_rows(state, sampling, kept, room)
            rows, room = np.take_along_axis(rows.reshape(shards, -1), kept, axis=1).ravel(), 2 * room
        taken = min(steps, room - used)
        state, chosen = programs.decode(decoder, state, sampling, np.int32(taken))
        used += taken


def _kept(done: Bool[np.ndarray, "shards rows"]) -> Int[np.ndarray, "shards kept"]:
    """Rows of each shard that are not done, filled up to a power of two, or to all rows, with some that are."""
    most = int((~done).sum(axis=1).max())
    size = min(done.shape[1], 1 << (most - 1).bit_length())
    return np.argsort(done, axis=1, kind="stable")[:, :size].astype(np.int32)
