"""Slots for answers under one plan, to questions of one bucket: the host's side of what runs in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from reroute_jax.decoder import Prefilled
from reroute_jax.engine.answering import Ran, usage_of
from reroute_jax.engine.answers import AnswerTokens, Usage
from reroute_jax.engine.batching import Batch, BatchShape, Layout
from reroute_jax.engine.groups import batch_of, padded_sizes
from reroute_jax.engine.image_cache import CachedPrefill
from reroute_jax.engine.running import dtype_of, overflow, run_prefill
from reroute_jax.engine.sampling import RowSampling, Sampling, row_sampling
from reroute_jax.engine.side_files import SideFiles
from reroute_jax.errors import RerouteError
from reroute_jax.nn.cache import token_bytes
from reroute_jax.nn.weights import Weights
from reroute_jax.routing.plan import Schedule
from reroute_jax.serving import slots
from reroute_jax.serving.requests import News, Request

SEGMENT_STEPS = 8  # tokens between two looks at who joins, who leaves and who reads along


@dataclass(frozen=True)
class PoolSize:
    """slots: answers that run side by side. prefill: rows that enter together, at most. room: tokens of an answer."""

    slots: int
    prefill: int
    room: int


@dataclass(frozen=True)
class Row:
    """A request in a slot. usage: with one token chosen. chosen: the answer so far."""

    request: Request
    usage: Usage
    chosen: AnswerTokens


class Pool:
    """Slots for questions that have `shape` but for fewer text tokens, of which `example` is one. cached: where it is
    given, takes what questions have in common up to their image from a cache.

    Whatever it will run is compiled when it is made. So there are few sizes: one row enters, or as many as a prefill
    holds; images that are new to a cache run together in numbers of `padded_sizes`, and slots decode together in those
    of `_ladder`.
    """

    def __init__(
        self,
        weights: Weights,
        files: SideFiles,
        schedule: Schedule,
        example: Layout,
        shape: BatchShape,
        size: PoolSize,
        cached: CachedPrefill | None = None,
    ) -> None:
        self.cached = cached
        self.weights, self.files, self.schedule, self.shape, self.size = weights, files, schedule, shape, size
        self.rows: list[Row | None] = [None] * size.slots
        self.sampling = _stacked([row_sampling(Sampling(stop=files.config.eos_tokens), [0])] * size.slots)
        self.example = example
        self.reset()
        self._run_all_programs()

    @property
    def running(self) -> list[int]:
        """Slots that are in use."""
        return [slot for slot, row in enumerate(self.rows) if row is not None]

    @property
    def free(self) -> list[int]:
        return [slot for slot, row in enumerate(self.rows) if row is None]

    def joining(self, waiting: int) -> int:
        """How many of so many requests can enter together now."""
        able = min(waiting, len(self.free))
        return self.size.prefill if able >= self.size.prefill else min(able, 1)

    def holds(self, layout: Layout, schedule: Schedule) -> bool:
        """Whether a question that was laid out for `schedule` can be answered here."""
        longer = replace(layout.shape, text=self.shape.text)
        return schedule == self.schedule and longer == self.shape and layout.shape.text <= self.shape.text

    def enter(self, requests: Sequence[Request]) -> None:
        """Prefill, and the first tokens, of requests that are `joining`."""
        batch = self._batch([request.layout for request in requests])
        prefilled = self._prefill(batch)
        own = [row_sampling(request.sampling, [request.number]) for request in requests]
        taken = self.free[: len(requests)]
        self.state, told = slots.admit(
            self.state,
            prefilled.logits,
            prefilled.cache,
            batch.seen,
            batch.live,
            _stacked(own),
            np.array(taken, np.int32),
        )
        ran, stages = Ran.of(prefilled), np.asarray(prefilled.finite)
        tokens, logprobs, done, finite = jax.device_get(told)
        for row, (slot, request) in enumerate(zip(taken, requests, strict=True)):
            usage = usage_of(self.weights, request.layout, batch.plan, ran, row, new_tokens=1)
            self.rows[slot] = Row(request, usage, AnswerTokens(frozenset(request.sampling.stop)))
            _put(self.sampling, slot, own[row])
            problem = overflow(batch.plan, stages[:, row], finite[row], dtype_of(self.weights), "this question")
            self._hear(slot, tokens[row], logprobs[row], done[row], problem)

    def advance(self) -> None:
        """Some more tokens in all slots that are in use."""
        taking = self._taking_part(len(self.running))
        running = np.array([self.rows[slot] is not None for slot in taking])
        told = self._decode(taking, running)
        tokens, logprobs, done, finite = jax.device_get(told)
        stages = np.ones(len(self.plan.stages), bool)
        for row in np.flatnonzero(running):
            problem = overflow(self.plan, stages, finite[row], dtype_of(self.weights), "this question")
            self._hear(int(taking[row]), tokens[row], logprobs[row], done[row], problem)

    def leave_cancelled(self) -> None:
        self.rows = [None if row is not None and row.request.cancelled else row for row in self.rows]

    def fail(self, error: RerouteError, entering: Sequence[Request]) -> None:
        """Tell all that run here or were about to, and begin anew: a program that failed may have taken the buffers
        with it."""
        for request in {*entering, *(row.request for row in self.rows if row is not None)}:
            request.tell(News(error=error))
        self.reset()

    def reset(self) -> None:
        """All slots free."""
        self.rows = [None] * self.size.slots
        batch = self._batch([self.example])
        prefilled = self._prefill(batch)
        self.plan = batch.plan
        self.state = slots.empty_pool(prefilled.logits, prefilled.cache, self.size.slots, self.size.room)

    def _run_all_programs(self) -> None:
        ends_at_once = Sampling(stop=self.files.config.eos_tokens, limit=1)
        for rows in {1, self.size.prefill}:
            self.enter([Request(self.example, ends_at_once, 0, lambda news: None)] * rows)
        for rows in padded_sizes(self.size.prefill) if self.cached else ():
            self.cached.prefixes_ahead(self.weights, self._batch([self.example] * rows))
        for count in _ladder(self.size.slots):
            taking = self._taking_part(count)
            self._decode(taking, np.zeros(len(taking), bool))

    def _batch(self, layouts: Sequence[Layout]) -> Batch:
        return batch_of(layouts, self.files, self.schedule, len(layouts), self.shape, encodes=self.cached is None)

    def _prefill(self, batch: Batch) -> Prefilled:
        return (self.cached or run_prefill)(self.weights, batch)[1]

    def _taking_part(self, running: int) -> np.ndarray:
        """Slots that decode together, ascending: those in use, and others up to a number of the ladder."""
        size = next(size for size in _ladder(self.size.slots) if size >= running)
        return np.sort([*self.running, *self.free[: size - len(self.running)]]).astype(np.int32)

    def _decode(self, taking: np.ndarray, running: np.ndarray) -> slots.Told:
        sampling = jax.tree.map(lambda column: column[taking], self.sampling)
        steps = np.int32(SEGMENT_STEPS)
        self.state, told = slots.advance(self.weights.decoder, self.state, sampling, taking, running, steps)
        return told

    def _hear(
        self, slot: int, tokens: np.ndarray, logprobs: np.ndarray, done: bool | np.bool_, problem: RerouteError | None
    ) -> None:
        """Tell a request what its row chose, `[steps]`, -1 behind the end; a row that is done or wrong leaves."""
        row = self.rows[slot]
        if done or problem is not None:
            self.rows[slot] = None
        row.request.tell(News(error=problem) if problem is not None else self._news(row, tokens, logprobs, bool(done)))

    def _news(self, row: Row, tokens: np.ndarray, logprobs: np.ndarray, done: bool) -> News:
        told, chosen = len(row.chosen.tokens), row.chosen
        chosen.add(tokens, logprobs)
        count = len(chosen.tokens) + chosen.stopped
        usage = replace(row.usage, new_tokens=count, kv_bytes=row.usage.kv_bytes + (count - 1) * self._token_bytes)
        reason = ("stop" if chosen.stopped else "length") if done else None
        return News(tuple(chosen.tokens[told:]), tuple(chosen.logprobs[told:]), usage, reason)

    @property
    def _token_bytes(self) -> int:
        """Of the keys and values of one token."""
        decoder = self.weights.config.decoder
        return decoder.num_layers * token_bytes(decoder, dtype_of(self.weights))


def _ladder(most: int) -> list[int]:
    """1, 4, 16, ... and `most`."""
    return [*(4**step for step in range(most.bit_length()) if 4**step < most), most]


def _stacked(rows: Sequence[RowSampling]) -> RowSampling:
    """Rows of one each, with the code that draws: it costs nothing while no row is drawn."""
    drawing = [replace(row, draws=True) for row in rows]
    return jax.tree.map(lambda *columns: np.concatenate(columns), *drawing)


def _put(sampling: RowSampling, slot: int, row: RowSampling) -> None:
    for column, value in zip(jax.tree.leaves(sampling), jax.tree.leaves(row), strict=True):
        column[slot] = value[0]
