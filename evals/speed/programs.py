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
from reroute_jax.engine import model as engine
from reroute_jax.engine.generation import Sampling
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
    """The three programs of one schedule and batch size."""

    subject: Subject
    schedule: Schedule
    tower: Compiled
    prefill: Compiled
    decode: Compiled

    @property
    def compile_seconds(self) -> float:
        return self.tower.seconds + self.prefill.seconds + self.decode.seconds

    @property
    def memory_bytes(self) -> int:
        """The most that one of them holds."""
        return max(step.nbytes for step in (self.tower, self.prefill, self.decode))

    @property
    def cache_bytes(self) -> int:
        """Of all keys and values as allocated, room for new tokens included."""
        arrays = [leaf for stage in self.prefill.shapes.cache.stages for leaf in (*stage.keys, *stage.values)]
        return sum(leaf.size * leaf.dtype.itemsize for leaf in arrays)

    def prepare(self, given: Sample) -> tuple:
        """Arrays on the device, for `run`."""
        inputs = given.inputs(self.subject.model, self.schedule)
        return jax.block_until_ready(jax.device_put((inputs.images[:3], inputs.batch.prompt, inputs.batch.seen)))

    def run(self, prepared: tuple) -> Answer:
        """Seconds of tower, prefill and decode, and tokens `[B, new]`."""
        images, prompt, seen = prepared
        module = self.subject.model.module
        marks = [time.perf_counter()]
        features, anchors = jax.block_until_ready(self.tower.program(module, *images))
        marks.append(time.perf_counter())
        out = jax.block_until_ready(self.prefill.program(module.decoder, prompt, features, anchors))
        marks.append(time.perf_counter())
        tokens, _ = jax.block_until_ready(
            self.decode.program(module.decoder, out.logits, out.cache, seen, jax.random.key(0))
        )
        marks.append(time.perf_counter())
        return tuple(np.diff(marks).tolist()), np.asarray(tokens)


def compile_tower(subject: Subject, schedule: Schedule, given: Sample) -> Compiled:
    """The image encoder, the same for all schedules with the same merge."""
    inputs = given.inputs(subject.model, schedule)
    return _compile(engine.encode, subject.model.module, *inputs.images)


def compile_programs(subject: Subject, schedule: Schedule, given: Sample, tower: Compiled, new_tokens: int) -> Programs:
    """Compile for prompts of the shape of `given`. Nothing runs: the model may be one of shapes only."""
    model = subject.model
    batch, decoder = given.inputs(model, schedule).batch, model.module.decoder
    prefill = _compile(engine.prefill, decoder, batch.prompt, *tower.shapes, batch.plan, new_tokens)
    sampling = Sampling(pad=model.config.pad_token)
    logits, cache = prefill.shapes.logits, prefill.shapes.cache
    decode = _compile(engine.decode, decoder, logits, cache, batch.seen, jax.random.key(0), sampling, new_tokens)
    return Programs(subject, schedule, tower, prefill, decode)


def trace_programs(
    subject: Subject, schedule: Schedule, given: Sample, new_tokens: int, device: jax.Device | None = None
) -> dict[str, jax.stages.Traced]:
    """The three programs by name, for prompts of the shape of `given`, to lower and compile ahead of time. Nothing
    compiles or runs. device: that they are for, which need not be in this machine (`jax.experimental.topologies`).
    """
    model, inputs = subject.model, given.inputs(subject.model, schedule)
    batch, sampling = inputs.batch, Sampling(pad=subject.model.config.pad_token)
    module = _on(device, model.module)

    def trace(function: Callable, *arguments) -> jax.stages.Traced:
        return function.jitted(device and device.platform).trace(*arguments)

    encode = trace(engine.encode, module, *_on(device, inputs.images[:3]), inputs.images[3])
    features = _on(device, encode.out_info)
    prefill = trace(engine.prefill, module.decoder, _on(device, batch.prompt), *features, batch.plan, new_tokens)
    state = _on(device, (prefill.out_info.logits, prefill.out_info.cache, batch.seen, jax.random.key(0)))
    decode = trace(engine.decode, module.decoder, *state, sampling, new_tokens)
    return {"encode": encode, "prefill": prefill, "decode": decode}


def _on(device: jax.Device | None, arrays):
    """The shapes of arrays, there."""
    sharding = None if device is None else SingleDeviceSharding(device)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arrays)


def _compile(function: Callable, *arguments) -> Compiled:
    start = time.perf_counter()
    traced = function.jitted().trace(*arguments)
    program = traced.lower().compile()
    return Compiled(program, traced.out_info, time.perf_counter() - start)
