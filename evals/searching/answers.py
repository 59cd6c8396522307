"""Answers of many schedules to the same questions: without a compilation each, where the simulator can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from reroute_jax.decoder import Prefilled
from reroute_jax.engine import programs
from reroute_jax.engine.answers import AnswerTokens
from reroute_jax.engine.batching import Batch, BatchShape, Question, lay_out
from reroute_jax.engine.groups import batch_of
from reroute_jax.engine.model import Model
from reroute_jax.engine.running import run_decode, run_prefill
from reroute_jax.engine.sampling import Sampling
from reroute_jax.routing import simulator
from reroute_jax.routing.plan import Schedule


@dataclass(frozen=True)
class Chunk:
    """Questions that are asked together under any schedule. shape: one that holds them all."""

    model: Model
    questions: Sequence[Question]
    shape: BatchShape

    def texts(self, schedule: Schedule, max_new_tokens: int) -> list[str]:
        """What `Model.answer` would say, greedily and with the checkpoint's repetition penalty."""
        config = self.model.config
        sampling = Sampling(repetition_penalty=config.repetition_penalty, stop=config.eos_tokens, limit=max_new_tokens)
        batch, prefilled = self._prefilled(schedule)
        rows = [AnswerTokens(frozenset(sampling.stop)) for _ in self.questions]
        for segment in run_decode(self.model.weights, batch, prefilled, range(len(rows)), sampling):
            for row, tokens, logprobs in zip(segment.rows, segment.tokens, segment.logprobs, strict=True):
                rows[row].add(tokens, logprobs)
        return [self.model.tokenizer.decode(row.tokens, skip_special_tokens=True) for row in rows]

    def _prefilled(self, schedule: Schedule) -> tuple[Batch, Prefilled]:
        if schedule.merge is None and not simulator.obstacles(schedule):
            batch, started = self._started
            return batch, simulator.prefill(started, schedule)
        batch = self._batch(schedule, None)
        return batch, run_prefill(self.model.weights, batch)[1]

    @cached_property
    def _started(self) -> tuple[Batch, simulator.Started]:
        batch = self._batch(self.model.plan("none"), self.shape)
        features, anchors = programs.encode(self.model.weights, batch.images)
        return batch, simulator.start(self.model.module.decoder, batch.prompt, features, anchors, (), 0)

    def _batch(self, schedule: Schedule, shape: BatchShape | None) -> Batch:
        layouts = [lay_out(one, self.model.config, schedule) for one in self.questions]
        return batch_of(layouts, self.model.files, schedule, len(layouts), shape)
