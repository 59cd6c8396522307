"""The least time a machine could take: its peaks, measured, and what a schedule must compute and move."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from reroute_jax.config import DecoderConfig
from reroute_jax.engine.compilation import compiled
from reroute_jax.engine.model import Model
from reroute_jax.nn.cache import token_bytes
from reroute_jax.nn.params import named_parameters
from reroute_jax.nn.products import matmul
from reroute_jax.routing.cost import compute, kv_width, repair_macs, scored_rows, visual_per_layer
from reroute_jax.routing.plan import Schedule

ROW = 2048  # of the array that is read


@dataclass(frozen=True)
class ProbeSize:
    """What peaks are measured with: side of the square product, and bytes of the array that is read."""

    side: int
    nbytes: int


CPU = ProbeSize(2048, 2**29)
# A millisecond of an accelerator that multiplies 1,000 TFLOP/s and reads 4 TB/s: a launch takes tens of microseconds.
ACCELERATOR = ProbeSize(8192, 2**32)


@dataclass(frozen=True)
class Machine:
    """Peaks: floating-point operations a second of a square matrix product, bytes a second of reading an array."""

    flops: float
    bandwidth: float

    def seconds(self, macs: float, nbytes: float) -> float:
        """The larger of the two bounds."""
        return max(2 * macs / self.flops, nbytes / self.bandwidth)


@dataclass(frozen=True)
class NumberSizes:
    """Bytes of a number of the activations, of the decoder's matrices and of its cache, scales shared out."""

    activation: float
    weight: float
    cached: float

    @classmethod
    def of(cls, model: Model) -> NumberSizes:
        decoder, dtype = model.config.decoder, model.dtype
        kernels = [value for path, value in named_parameters(model.module.decoder).items() if path.endswith(".kernel")]
        nbytes = sum(part.nbytes for part in jax.tree.leaves(kernels))
        numbers = sum(math.prod(value.shape) for value in kernels)
        cached = token_bytes(decoder, dtype) / (2 * kv_width(decoder))
        return cls(jnp.dtype(dtype).itemsize, nbytes / numbers, cached)


@compiled()
def _product(a, b):
    return a @ b


@compiled()
def _read(table, x):
    """A product with one row, as in a decode step: every element of `table` is read once."""
    return matmul(x, table)


def measure_machine(dtype: str, repetitions: int = 7) -> Machine:
    """Best of several: a shared machine is never faster than it is."""
    probe, kind = CPU if jax.default_backend() == "cpu" else ACCELERATOR, jnp.dtype(dtype)
    square = jnp.ones((probe.side, probe.side), kind)
    x, table = jnp.ones((1, ROW), kind), jnp.ones((probe.nbytes // (ROW * kind.itemsize), ROW), kind)
    product = best_seconds(lambda: _product(square, square), repetitions)
    read = best_seconds(lambda: _read(table, x), repetitions)
    return Machine(2 * probe.side**3 / product, table.nbytes / read)


def best_seconds(call: Callable, repetitions: int) -> float:
    """Of `repetitions` calls after a first one."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return min(times)


def prefill_bound(
    machine: Machine,
    schedule: Schedule,
    config: DecoderConfig,
    *,
    visual: int,
    text: int,
    batch: int,
    sizes: NumberSizes,
) -> float:
    """Seconds: of each layer, each scoring pass and the head the larger bound, added up.

    visual: at the decoder input. A layer moves its weights once, its rows in and out, and the keys and values it
    caches; a score that projects moves the key and query projections and its rows; the head its weights.
    """
    d, kv, heads = config.hidden_size, kv_width(config), config.num_heads * config.head_dim
    weights = layer_weights(config)
    total = 0.0
    for present in visual_per_layer(schedule, visual):
        rows = batch * (present + text)
        macs = batch * compute(config, [present + text], []).gqa
        total += machine.seconds(macs, sizes.weight * weights + 2 * rows * (sizes.activation * d + sizes.cached * kv))
    for present, score in scored_rows(schedule, visual):
        macs, rows = batch * score.macs(config, present, text), batch * (present + text)
        moved = sizes.weight * d * (heads + kv) + sizes.activation * rows * (d + kv) if score.projects else 0
        total += machine.seconds(macs, moved)
    for macs in repair_macs(schedule, config, visual):
        # Reads the rows that wait, about all of them, and writes them.
        total += machine.seconds(batch * macs, sizes.activation * 2 * batch * visual * d * (macs > 0))
    return total + machine.seconds(batch * d * config.vocab_size, sizes.weight * d * config.vocab_size)


def decode_bound(machine: Machine, config: DecoderConfig, *, kv_bytes: float, batch: int, sizes: NumberSizes) -> float:
    """Seconds of one step: all weights, the embedding excepted, and `kv_bytes` of cache for the whole batch."""
    weights = config.num_layers * layer_weights(config) + config.hidden_size * config.vocab_size
    cache_macs = kv_bytes / sizes.cached * config.num_heads / config.num_kv_heads
    return machine.seconds(batch * weights + cache_macs, sizes.weight * weights + kv_bytes)


def layer_weights(config: DecoderConfig) -> int:
    """Numbers in the matrices of one decoder layer."""
    d = config.hidden_size
    heads = config.num_heads * config.head_dim
    return 2 * d * heads + 2 * d * kv_width(config) + 3 * d * config.mlp_dim
