"""From a batch of questions to answers: as wholes with their costs, or token by token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from reroute_jax.decoder import Prefilled
from reroute_jax.engine import programs
from reroute_jax.engine.answers import Answer, AnswerTokens, Usage
from reroute_jax.engine.batching import Batch, Layout
from reroute_jax.engine.groups import Group
from reroute_jax.engine.running import Prefill, checked_segments, dtype_of, overflow, run_decode
from reroute_jax.engine.sampling import Sampling
from reroute_jax.engine.trace import Trace
from reroute_jax.nn.cache import token_bytes
from reroute_jax.nn.weights import Weights
from reroute_jax.routing.static_plan import RoutingPlan

STREAM_STEPS = 4  # tokens between two looks at a stream


def answer_group(
    weights: Weights, tokenizer: Any, group: Group, sampling: Sampling, prefill: Prefill, trace: bool
) -> list[Answer]:
    """In the order of the group. A question whose numbers overflow has an `error`."""
    batch, dtype = group.batch, dtype_of(weights)
    anchors, prefilled = prefill(weights, batch)
    images = [image for layout in group.layouts for image in layout.question.images]
    merged = partial(programs.members, weights, batch.images)
    traces = Trace.of(batch, prefilled, anchors, weights.config, dtype, lambda: images, merged) if trace else None
    # Decoding takes the cache.
    ran = Ran.of(prefilled)
    rows, finite = _chosen(weights, group, prefilled, sampling)
    stages, answers = np.asarray(prefilled.finite), []
    for row, (number, chosen) in enumerate(zip(group.numbers, rows, strict=True)):
        problem = overflow(batch.plan, stages[:, row], finite[row], dtype, f"question {number}")
        if problem is not None:
            answers.append(Answer(error=problem))
            continue
        answers.append(
            Answer(
                text=tokenizer.decode(chosen.tokens, skip_special_tokens=True),
                token_ids=tuple(chosen.tokens),
                finish_reason="stop" if chosen.stopped else "length",
                logprobs=tuple(chosen.logprobs),
                trace=None if traces is None else traces.of_row(row),
                usage=usage_of(weights, group.layouts[row], batch.plan, ran, row, len(chosen.tokens) + chosen.stopped),
            )
        )
    return answers


def stream_tokens(weights: Weights, batch: Batch, sampling: Sampling, prefill: Prefill) -> Iterator[int]:
    """The answer of a batch of one row as it comes, without the id that ends it. Raises RerouteError where numbers
    overflow."""
    chosen = AnswerTokens(frozenset(sampling.stop))
    for segment in checked_segments(weights, batch, sampling, prefill, STREAM_STEPS):
        shown = len(chosen.tokens)
        chosen.add(segment.tokens[0], segment.logprobs[0])
        yield from chosen.tokens[shown:]


def _chosen(
    weights: Weights, group: Group, prefilled: Prefilled, sampling: Sampling
) -> tuple[list[AnswerTokens], np.ndarray]:
    """What each question chose, and of each row whether all its logits were finite."""
    rows = [AnswerTokens(frozenset(sampling.stop)) for _ in group.numbers]
    finite = np.ones(len(group.batch.live), bool)
    numbers = (*group.numbers, *[0] * (len(finite) - len(rows)))
    for segment in run_decode(weights, group.batch, prefilled, numbers, sampling):
        finite[segment.rows] &= segment.finite
        for row, tokens, logprobs in zip(segment.rows, segment.tokens, segment.logprobs, strict=True):
            if row < len(rows):
                rows[row].add(tokens, logprobs)
    return rows, finite


@dataclass(frozen=True)
class Ran:
    """What a prefill left, on the host. running: by decision what of each row ran instead of its visual tokens, proxies
    too. cached: of each stage of the cache the number of its layers, and the tokens that each row holds in one."""

    running: tuple[np.ndarray, ...]
    cached: tuple[tuple[int, np.ndarray], ...]

    @classmethod
    def of(cls, prefilled: Prefilled) -> Ran:
        return cls(
            tuple(np.asarray(one.selected).sum(axis=1) + np.asarray(one.proxies) for one in prefilled.decisions),
            tuple((len(stage.keys), np.asarray(stage.length)) for stage in prefilled.cache.stages),
        )


def usage_of(weights: Weights, layout: Layout, plan: RoutingPlan, ran: Ran, row: int, new_tokens: int) -> Usage:
    """Of a question in `row` of a batch under `plan`, the id that ended its answer among the new tokens."""
    running, layers = iter(ran.running), []
    fixed = layout.visual - int(layout.routed.sum())
    for stage in plan.stages:
        visual = layout.visual if stage.cap is None else fixed + int(next(running)[row])
        layers += [visual] * (stage.hi - stage.lo)
    cached = sum(count * int(length[row]) for count, length in ran.cached)
    # The last token is chosen and not fed.
    tokens = cached + len(layers) * (new_tokens - 1)
    each = token_bytes(weights.config.decoder, dtype_of(weights))
    visual = sum(rows * cols for rows, cols in layout.question.grids)
    return Usage(len(layout.question.ids), visual, tuple(layers), new_tokens, tokens * each)
