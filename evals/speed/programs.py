"""The compiled programs of one schedule and batch size, timed step by step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from evals.speed.subjects import Sample, Subject
from reroute_jax.engine import programs
from reroute_jax.engine.compilation import on_mesh_of
from reroute_jax.engine.generation import SEGMENT
from reroute_jax.engine.sampling import RowSampling, Sampling, row_sampling
from reroute_jax.errors import RerouteError
from reroute_jax.nn.sharding import mesh_of
from reroute_jax.routing.plan import Schedule

Steps = tuple[float, float, float]
Answer = tuple[Steps, np.ndarray]


@dataclass(frozen=True)
class Compiled:
    """One program, ready to run. seconds: that tracing and compiling took."""

    program: Any
    shapes: Any
    seconds: float

    @property
    def nbytes(self) -> int:
        """Arguments with the parameters, results, and what it works in."""
        stats = self.program.memory_analysis()
        held = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
        return held - stats.alias_size_in_bytes


@dataclass(frozen=True)
class Programs:
    """The programs of one schedule and batch size. begin: chooses first tokens, which counts as decode."""

    subject: Subject
    schedule: Schedule
    tower: Compiled
    prefill: Compiled
    begin: Compiled
    decode: Compiled
    sampling: RowSampling

    @property
    def compile_seconds(self) -> float:
        return sum(step.seconds for step in (self.tower, self.prefill, self.begin, self.decode))

    @property
    def memory_bytes(self) -> int:
        """The most that one of them holds."""
        return max(step.nbytes for step in (self.tower, self.prefill, self.decode))

    @property
    def cache_bytes(self) -> int:
        """Of all keys and values as allocated, room for new tokens included."""
        return self.prefill.shapes.cache.nbytes

    def prepare(self, given: Sample) -> tuple:
        """Arrays on the device, for `run`."""
        batch = given.batch(self.subject.model, self.schedule)
        return jax.block_until_ready(jax.device_put((batch.images, batch.prompt, batch.seen, batch.live)))

    def run(self, prepared: tuple) -> Answer:
        """Seconds of tower, prefill and decode, and tokens `[B, new]`."""
        images, prompt, seen, live = prepared
        weights = self.subject.model.weights
        marks = [time.perf_counter()]
        features, anchors = jax.block_until_ready(self.tower.program(weights, images))
        marks.append(time.perf_counter())
        out = jax.block_until_ready(self.prefill.program(weights.decoder, prompt, features, anchors))
        marks.append(time.perf_counter())
        steps = np.int32(self.sampling.limit[0] - 1)
        state, first = self.begin.program(out.logits, out.cache, seen, live, self.sampling)
        _, others = jax.block_until_ready(self.decode.program(weights.decoder, state, self.sampling, steps))
        marks.append(time.perf_counter())
        tokens = np.concatenate([first.tokens, others.tokens], axis=1)[:, : steps + 1]
        return tuple(np.diff(marks).tolist()), tokens


def compile_tower(subject: Subject, schedule: Schedule, given: Sample) -> Compiled:
    """The image encoder, the same for all schedules with the same merge."""
    return _compile(programs.encode, subject.model.weights, given.batch(subject.model, schedule).images)


def compile_programs(subject: Subject, schedule: Schedule, given: Sample, tower: Compiled, new_tokens: int) -> Programs:
    """Compile for prompts of the shape of `given`. Nothing runs: the model may be one of shapes only.

    Raises RerouteError for answers that take more than one segment.
    """
    if new_tokens > SEGMENT + 1:
        raise RerouteError(f"{new_tokens} new tokens are more than one segment of decoding, expected {SEGMENT + 1}")
    batch, decoder = given.batch(subject.model, schedule), subject.model.weights.decoder
    sampling = row_sampling(Sampling(limit=new_tokens), [0] * len(batch.live))
    prefill = _compile(programs.prefill, decoder, batch.prompt, *tower.shapes, batch.plan)
    first = prefill.shapes.logits, prefill.shapes.cache, batch.seen, batch.live
    begin = _compile(programs.begin, *first, sampling)
    decode = _compile(programs.decode, decoder, begin.shapes[0], sampling, jax.ShapeDtypeStruct((), np.int32))
    return Programs(subject, schedule, tower, prefill, begin, decode, sampling)


def trace_programs(
    subject: Subject, schedule: Schedule, given: Sample, device: jax.Device | None = None
) -> dict[str, jax.stages.Traced]:
    """The programs by name, for prompts of the shape of `given`, to lower and compile ahead of time. Nothing compiles
    or runs. device: that they are for, which need not be in this machine (`jax.experimental.topologies`); of a model on
    a mesh, any of its devices.
    """
    batch, weights, platform = given.batch(subject.model, schedule), subject.model.weights, device and device.platform
    if mesh_of(weights) is not None:
        device = None  # the parameters say where everything is, the compiler lays out the rest
    else:
        weights = _on(device, weights)
    sampling = _on(device, row_sampling(Sampling(), [0] * len(batch.live)))

    def trace(function: Callable, *arguments) -> jax.stages.Traced:
        with on_mesh_of(weights):
            return function.jitted(platform).trace(*arguments)

    encode = trace(programs.encode, weights, _on(device, batch.images))
    features = _on(device, encode.out_info)
    prefill = trace(programs.prefill, weights.decoder, _on(device, batch.prompt), *features, batch.plan)
    first = prefill.out_info.logits, prefill.out_info.cache, batch.seen, batch.live
    begin = trace(programs.begin, *_on(device, first), sampling)
    state, steps = _on(device, (begin.out_info[0], np.int32(0)))
    decode = trace(programs.decode, weights.decoder, state, sampling, steps)
    return {"encode": encode, "prefill": prefill, "begin": begin, "decode": decode}


def _on(device: jax.Device | None, arrays):
    """The shapes of arrays, there."""
    sharding = None if device is None else SingleDeviceSharding(device)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arrays)


def _compile(function: Callable, *arguments) -> Compiled:
    start = time.perf_counter()
    program, shapes = function.compile(*arguments)
    return Compiled(program, shapes, time.perf_counter() - start)
