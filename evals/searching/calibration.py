"""Prompts that schedules are tried on, without labels: the model's own answers with all tokens are what is kept to.

A schedule's divergence on a prompt is KL(all tokens || schedule) of the next token, in nats, with the answer that all
tokens give forced on both, averaged over the first `ANSWER` tokens of that answer. One prompt counts for `CLIP` at
most: a few that go wrong altogether would otherwise decide, and hide how often that happens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from reroute_jax.decoder import Decoder
from reroute_jax.engine import programs
from reroute_jax.engine.batching import Question, largest, lay_out
from reroute_jax.engine.compilation import compiled
from reroute_jax.engine.groups import batch_of
from reroute_jax.engine.model import Model
from reroute_jax.errors import RerouteError
from reroute_jax.routing import simulator
from reroute_jax.routing.merge import Merge
from reroute_jax.routing.plan import Schedule

ANSWER = 16  # tokens of an answer that count, its end among them
CLIP = 1.0


@dataclass(frozen=True)
class CalibrationPrompt:
    """A prompt with what all tokens answer. answer: tokens that are forced; counted: predictions that count, one more
    than those. cluster: prompts that share one depend on each other."""

    question: Question
    task: str
    cluster: str
    answer: tuple[int, ...]
    counted: int


@dataclass(frozen=True)
class Calibration:
    """Prompts in chunks that schedules run on. asked: in the order of the chunks. whole: of each chunk what all tokens
    leave behind the layers, as of `simulator.Started.final`."""

    asked: tuple[CalibrationPrompt, ...]
    chunks: tuple[simulator.Started, ...]
    whole: tuple[Float[Array, "B A D"], ...]
    counted: tuple[Int[np.ndarray, " B"], ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(one.task for one in self.asked)

    def divergences(self, schedule: Schedule, first: int = 0, last: int | None = None) -> Float[np.ndarray, " prompts"]:
        """Of the prompts in chunks `first` to `last` (behind the last one; None: all) under a schedule, clipped."""
        found, own = [], slice(first, last)
        for chunk, whole, counted in zip(self.chunks[own], self.whole[own], self.counted[own], strict=True):
            final = simulator.simulate(chunk, schedule).final
            found.append(np.asarray(_divergence(chunk.decoder, whole, final, counted)))
        return np.minimum(np.concatenate([np.zeros(0), *found]), CLIP)


def ask(model: Model, questions: Sequence[tuple[Question, str, str]], batch_size: int) -> list[CalibrationPrompt]:
    """(question, task, cluster) of each prompt with what all tokens answer."""
    asked, answers = [], model.answer([one for one, _, _ in questions], max_new_tokens=ANSWER, batch_size=batch_size)
    for (question, task, cluster), answer in zip(questions, answers, strict=True):
        counted = min(ANSWER, len(answer.token_ids) + (answer.finish_reason == "stop"))
        asked.append(CalibrationPrompt(question, task, cluster, answer.token_ids[: ANSWER - 1], counted))
    return asked


def calibrate(
    model: Model,
    asked: Sequence[CalibrationPrompt],
    batch_size: int,
    kept: Sequence[int],
    done: Callable[[int], Any],
    merge: Merge | None = None,
) -> Calibration:
    """Run the prompts with all tokens, and with those that a merge leaves, in chunks of one shape. kept: as of
    `simulator.start`. done: is told of each chunk how many prompts it held."""
    unrouted = model.plan("none")
    start_whole = _starter(model, asked, unrouted, kept if merge is None else (0,))
    start_merged = None if merge is None else _starter(model, asked, replace(unrouted, merge=merge), kept)
    chunks, whole, counted = [], [], []
    for first in range(0, len(asked), batch_size):
        own = slice(first, first + batch_size)
        chunk = start_whole(own)
        whole.append(chunk.final)
        chunks.append(chunk if start_merged is None else start_merged(own))
        counted.append(np.array([one.counted for one in asked[own]], np.int32))
        done(len(counted[-1]))
    return Calibration(tuple(asked), tuple(chunks), tuple(whole), tuple(counted))


def _starter(
    model: Model, asked: Sequence[CalibrationPrompt], schedule: Schedule, kept: Sequence[int]
) -> Callable[[slice], simulator.Started]:
    """Starts some of the prompts, all in one shape. schedule: without decisions."""
    layouts = [lay_out(one.question, model.config, schedule) for one in asked]
    shape = largest([one.shape for one in layouts])

    def started(own: slice) -> simulator.Started:
        batch = batch_of(layouts[own], model.files, schedule, len(layouts[own]), shape)
        features, anchors = programs.encode(model.weights, batch.images)
        answers = [one.answer for one in asked[own]]
        return simulator.start(model.module.decoder, batch.prompt, features, anchors, answers, ANSWER - 1, kept)

    return started


def kept_layers(model: Model, prompts: int, slots: int, limit: int) -> tuple[int, ...]:
    """Layers whose input is kept: as many, evenly spaced from 0 on, as `limit` bytes hold. Raises RerouteError where
    they do not even hold one."""
    config = model.config.decoder
    each = simulator.bytes_kept(config, 1, prompts, slots, jnp.dtype(model.dtype).itemsize)
    count = min(config.num_layers, limit // each)
    if count < 1:
        raise RerouteError(
            f"{prompts} prompts of {slots} slots take {each / 1e9:.3g} GB: raise --memory, or lower --limit"
        )
    return tuple(range(0, config.num_layers, -(-config.num_layers // count)))


def task_means(values: Float[np.ndarray, " prompts"], tasks: Sequence[str]) -> dict[str, float]:
    """Mean divergence of each task."""
    of = np.array(tasks[: len(values)])
    return {task: float(values[of == task].mean()) for task in dict.fromkeys(of.tolist())}


@compiled()
def _divergence(
    decoder: Decoder,
    full: Float[Array, "B A D"],
    routed: Float[Array, "B A D"],
    counted: Int[Array, " B"],
) -> Float[Array, " B"]:
    wanted, found = (jax.nn.log_softmax(decoder.logits(final)) for final in (full, routed))
    each = (jnp.exp(wanted) * (wanted - found)).sum(axis=-1)
    counts = jnp.arange(each.shape[1]) < counted[:, None]
    return (each * counts).sum(axis=1) / counted
