"""Compiling ahead of the first question."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from reroute_jax.engine import programs
from reroute_jax.engine.batching import Batch
from reroute_jax.engine.running import PrefillAhead
from reroute_jax.engine.sampling import Sampling, row_sampling
from reroute_jax.nn.cache import ROOM
from reroute_jax.nn.sharding import row_shards
from reroute_jax.nn.weights import Weights


def compile_ahead(weights: Weights, batches: Sequence[Batch], sampling: Sampling, prefill: PrefillAhead) -> None:
    """Compile all programs of batches of one shape and of these numbers of rows, for answers of up to `sampling.limit`
    tokens. batches: of every number that a batch may shrink to, ascending."""
    states, of_rows, shards = {}, {}, row_shards(weights)
    for batch in batches:
        rows = len(batch.live)
        of_rows[rows] = row_sampling(sampling, [0] * rows)
        prefilled = prefill(weights, batch)
        first = prefilled.logits, prefilled.cache, batch.seen, batch.live, of_rows[rows]
        states[rows], _ = programs.begin.ahead(*first)
    _compile_decode(weights, states, of_rows)
    room = ROOM
    while room < sampling.limit - 1:
        grown = {}
        for rows in states:
            kept = jax.ShapeDtypeStruct((shards, rows // shards), jnp.int32)
            for larger in (other for other in states if other >= rows):
                grown[rows], of_rows[rows] = programs.keep_rows.ahead(states[larger], of_rows[larger], kept, room)
        states, room = grown, 2 * room
        _compile_decode(weights, states, of_rows)


def _compile_decode(weights: Weights, states: dict, of_rows: dict) -> None:
    for rows, state in states.items():
        programs.decode.ahead(weights.decoder, state, of_rows[rows], jax.ShapeDtypeStruct((), jnp.int32))
