"""`python -m benchmarks.attention --shape 7b --dtype bfloat16`

Causal attention of a prefill by this project and by `jax.nn.dot_product_attention` (XLA and cuDNN), and attention of a
decode step on the two layouts of its cache. Medians of repetitions in which the variants take turns, and the largest
difference of each from ours in fp32.

A prefill takes queries, keys and values `[B, T, heads, H]`, as products give them, returns what was seen in the same
form, and keys and values `[B, K, T, H]`, as the cache stores them: every variant pays the transpositions that the
decoder would pay with it. Several layers stand in one program, so that starting it is a small part of the time.

Letters as in `reroute_jax.nn.layers`.
"""

from __future__ import annotations

import argparse
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from evals.harness.run_folder import write_json
from reroute_jax.commandline.parsing import DATA, OUTPUT, RUN, Parser, exit_code, positive
from reroute_jax.engine.compilation import compiled
from reroute_jax.errors import RerouteError
from reroute_jax.nn.attention import attention
from reroute_jax.routing.budget import TIERS
from reroute_jax.routing.methods import plan
from reroute_jax.types import FLOATS, Grid

OURS, XLA, CUDNN = "ours", "dot_product_attention xla", "dot_product_attention cudnn"
HEADS_FIRST, SLOTS_FIRST = "cache [B, K, S, H] (ours)", "cache [B, S, K, H]"
# Largest difference from fp32 that rounding explains, as a share of the largest value.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}


@dataclass(frozen=True)
class Backbone:
    """The attention of one model."""

    name: str
    family: str
    layers: int
    heads: int
    kv_heads: int
    dim: int


@dataclass(frozen=True)
class AttentionShape:
    """What is timed. grid, text, budgets: of prompts, see `prompt_slots`. layers: of a prefill in one program. cached,
    steps: slots that decode finds, and tokens that it adds. cache_bytes: the least that the caches of a decode hold
    together."""

    backbones: tuple[Backbone, ...]
    grid: Grid
    text: int
    budgets: tuple[int, ...]
    layers: int
    cached: int
    steps: int
    cache_bytes: int


SHAPES = {
    "7b": AttentionShape(
        (
            Backbone("LLaVA-1.5-7B", "llava", 32, 32, 32, 128),
            Backbone("Qwen2.5-VL-7B", "qwen2_5_vl", 28, 28, 4, 128),
        ),
        grid=(24, 24),
        text=64,
        budgets=tuple(TIERS),
        layers=16,
        cached=640,
        steps=16,
        # The weights of a model pass between two reads of a layer's cache; here the second-level cache of a GPU (50 MB
        # of an H100) must not hold what was read a step before.
        cache_bytes=2**28,
    ),
    "rehearsal": AttentionShape(
        (Backbone("MHA", "llava", 32, 4, 4, 16), Backbone("GQA", "qwen2_5_vl", 28, 6, 2, 16)),
        grid=(16, 16),
        text=16,
        budgets=(128,),
        layers=2,
        cached=40,
        steps=3,
        cache_bytes=2**16,
    ),
}


@dataclass(frozen=True)
class AttentionVariant:
    """call: runs it once and returns what was seen, or None with the reason why it cannot run."""

    name: str
    call: Callable[[], Array] | None
    note: str = ""


@dataclass(frozen=True)
class Case:
    """Variants to compare. layers: of one call, decode steps counted each. expected: what they should see, fp32."""

    kind: str
    backbone: str
    batch: int
    slots: int
    layers: int
    variants: tuple[AttentionVariant, ...]
    expected: Array


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 after one line on bad input or a variant that computes something else."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: compare(args, list(sys.argv[1:] if argv is None else argv)), args.debug)


def compare(args: argparse.Namespace, arguments: Sequence[str]) -> None:
    rows, shape = [], SHAPES[args.shape]
    # TF32, which a GPU multiplies fp32 with, is no fp32.
    with jax.default_matmul_precision("highest" if args.dtype == "float32" else None):
        for backbone in shape.backbones:
            for batch in args.batch_sizes:
                for slots in prompt_slots(backbone, shape):
                    rows += rows_of(prefill_case(backbone, shape, batch, slots, args.dtype), args.repetitions)
                rows += rows_of(decode_case(backbone, shape, batch, args.dtype), args.repetitions)
    text = table(rows)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.attention", *arguments]),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "dtype": args.dtype,
        "rows": rows,
    }
    write_json(args.out / "attention.json", result)
    (args.out / "table.md").write_text(text + "\n")
    print(f"\nattention.json, table.md: {args.out}")
    check(rows, args.dtype)


def prompt_slots(backbone: Backbone, shape: AttentionShape) -> list[int]:
    """Of the unrouted prompt, and of the layers behind FastV's decision at each budget."""
    visual = shape.grid[0] * shape.grid[1]
    given = {"num_layers": backbone.layers, "visual": visual, "grid": shape.grid, "family": backbone.family}
    schedules = [plan("fastv", budget=one, **given) for one in shape.budgets]
    return [shape.text + visual, *(shape.text + one.resolve(visual).stages[-1].cap for one in schedules)]


def prefill_case(backbone: Backbone, shape: AttentionShape, batch: int, slots: int, dtype: str) -> Case:
    heads = (backbone.heads, backbone.kv_heads, backbone.kv_heads)
    sizes = tuple((batch, slots, count, backbone.dim) for count in heads)
    qkv = normal((sizes,) * shape.layers, dtype)
    variants = (
        AttentionVariant(OURS, partial(_first, prefill, qkv, attend=ours)),
        AttentionVariant(XLA, partial(_first, prefill, qkv, attend=partial(library, "xla"))),
        cudnn_variant(partial(_first, prefill, qkv, attend=partial(library, "cudnn")), dtype),
    )
    with jax.default_matmul_precision("highest"):
        expected = prefill(_wide(qkv), attend=ours)[0]
    return Case("prefill", backbone.name, batch, slots, shape.layers, variants, expected)


def decode_case(backbone: Backbone, shape: AttentionShape, batch: int, dtype: str) -> Case:
    room, width = shape.cached + shape.steps, backbone.kv_heads * backbone.dim
    layers = math.ceil(shape.cache_bytes / (2 * batch * room * width * jnp.dtype(dtype).itemsize))
    size, heads = (batch, backbone.kv_heads, room, backbone.dim), (backbone.heads, backbone.kv_heads, backbone.kv_heads)
    sizes = tuple((shape.steps, batch, count, backbone.dim) for count in heads)
    new, *caches = normal((sizes, *((size, size),) * layers), dtype)
    with jax.default_matmul_precision("highest"):
        expected = decode(_wide(new), _wide(caches), cached=shape.cached, axis=2)[0]
    turned = jax.tree.map(lambda x: x.swapaxes(1, 2), caches)
    variants = (
        AttentionVariant(HEADS_FIRST, decoding(new, caches, shape.cached, axis=2)),
        AttentionVariant(SLOTS_FIRST, decoding(new, turned, shape.cached, axis=1)),
    )
    return Case("decode", backbone.name, batch, shape.cached, layers * shape.steps, variants, expected)


def normal(groups, dtype: str) -> list[list[Array]]:
    """Random arrays of the shapes in `groups`."""
    keys = iter(jax.random.split(jax.random.key(0), sum(map(len, groups))))
    return [[_normal(next(keys), size, dtype) for size in sizes] for sizes in groups]


# One program a shape: all of them in one took a GPU minutes to compile.
@compiled(static_argnames=("size", "dtype"))
def _normal(key: Array, size: tuple[int, ...], dtype: str) -> Array:
    return jax.random.normal(key, size, dtype)


@compiled(static_argnames="attend")
def prefill(qkv, attend) -> tuple[Float[Array, "B T N H"], list]:
    """What the last of some layers sees, and the cache of all. qkv: of each layer `[B, T, heads, H]`; each adds to its
    queries what the one before saw, so that they run one after the other."""
    seen, caches = 0, []
    for q, k, v in qkv:
        seen, *cache = attend(q + seen, k, v)
        caches.append(cache)
    return seen, caches


def ours(q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> tuple[Array, ...]:
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return attention(q, k, v, causal=True).swapaxes(1, 2), k, v


def library(
    implementation: str, q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
) -> tuple[Array, ...]:
    seen = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
    return seen, k.swapaxes(1, 2), v.swapaxes(1, 2)


@compiled(static_argnames=("cached", "axis"), donate_argnames="caches")
def decode(new, caches, cached: int, axis: int) -> tuple[Float[Array, "steps B N 1 H"], list]:
    """What the last layer sees at each step, and the caches. new: queries, keys and values of all steps
    `[steps, B, heads, H]`, the same in each layer. axis: of the slots in a cache."""
    queries, *added = new
    slots = jnp.arange(caches[0][0].shape[axis])

    def step(number, state):
        outputs, caches = state
        visible = jnp.broadcast_to(slots <= cached + number, (queries.shape[1], 1, len(slots)))
        seen, written = 0, []
        for layer in caches:
            both = [
                jax.lax.dynamic_update_slice_in_dim(old, jnp.expand_dims(of[number], axis), cached + number, axis)
                for old, of in zip(layer, added, strict=True)
            ]
            # As in the decoder: see `layers.DecoderLayer.decode`.
            keys, values = jax.lax.optimization_barrier(tuple(both))
            written.append([keys, values])
            heads_first = (x if axis == 2 else x.swapaxes(1, 2) for x in (keys, values))
            seen = attention(queries[number][:, :, None] + seen, *heads_first, visible)
        return outputs.at[number].set(seen), written

    outputs = jnp.zeros((*queries.shape[:3], 1, queries.shape[3]), queries.dtype)
    return jax.lax.fori_loop(0, len(queries), step, (outputs, caches))


def decoding(new, caches, cached: int, axis: int) -> Callable[[], Array]:
    """A call that decodes on caches of its own, which each run gives back to the next."""
    held = [caches]

    def call() -> Array:
        outputs, held[0] = decode(new, held[0], cached=cached, axis=axis)
        return outputs

    return call


def cudnn_variant(call: Callable[[], Array], dtype: str) -> AttentionVariant:
    """Without a call, and with the reason, where cuDNN cannot run or refuses this GPU or this shape."""
    if jax.default_backend() != "gpu":
        return AttentionVariant(CUDNN, None, "needs a GPU")
    if dtype == "float32":
        return AttentionVariant(CUDNN, None, "needs bfloat16 or float16")
    try:
        jax.block_until_ready(call())
    except RuntimeError as refusal:
        return AttentionVariant(CUDNN, None, f"refused: {' '.join(str(refusal).split())[:200]}")
    return AttentionVariant(CUDNN, call)


def rows_of(case: Case, repetitions: int) -> list[dict[str, Any]]:
    """One row a variant; those that run take turns, after a first run each. The first is ours."""
    able = [variant for variant in case.variants if variant.call]
    times = {variant.name: [] for variant in able}
    for variant in able:
        jax.block_until_ready(variant.call())
    for _ in range(repetitions):
        for variant in able:
            start = time.perf_counter()
            jax.block_until_ready(variant.call())
            times[variant.name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(found) / case.layers for name, found in times.items()}
    largest, first = float(jnp.abs(case.expected).max()), seconds[case.variants[0].name]
    rows = []
    for variant in case.variants:
        row = {"kind": case.kind, "model": case.backbone, "batch": case.batch, "slots": case.slots}
        row |= {"variant": variant.name, "note": variant.note}
        if variant.call:
            row["us_a_layer"] = 1e6 * seconds[variant.name]
            row["times_ours"] = seconds[variant.name] / first
            row["difference"] = float(jnp.abs(variant.call().astype(jnp.float32) - case.expected).max())
            row["difference_of_largest"] = row["difference"] / largest
        rows.append(row)
    return rows


def check(rows: Sequence[dict[str, Any]], dtype: str) -> None:
    """Raises RerouteError where a variant differs by more than rounding to `dtype` explains."""
    for row in rows:
        if row.get("difference_of_largest", 0) <= TOLERANCE[dtype]:
            continue
        raise RerouteError(
            f"{row['variant']} ({row['kind']}, {row['model']}, batch {row['batch']}, {row['slots']} slots) is off by "
            f"{row['difference_of_largest']:.1e} of the largest value, expected at most {TOLERANCE[dtype]:.0e} in "
            f"{dtype}: its time does not count"
        )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| | model | batch | slots | variant | µs a layer | times ours | largest difference | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["kind"], row["model"], str(row["batch"]), str(row["slots"]), row["variant"]]
        measured = (("us_a_layer", "{:.1f}"), ("times_ours", "{:.2f}"), ("difference", "{:.1e}"))
        cells += [form.format(row[key]) if key in row else "" for key, form in measured]
        lines.append(f"| {' | '.join(cells)} | {row['note']} |")
    return "\n".join(lines)


def _first(function: Callable, *args, **kwargs) -> Array:
    return function(*args, **kwargs)[0]


def _wide(arrays):
    """fp32 copies, which may be donated."""
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32), arrays)


def _parser() -> Parser:
    examples = (
        "--shape 7b",
        "--shape rehearsal --dtype float32 --repetitions 3",
        "--batch-sizes 1 --out runs/attention-1",
    )
    parser = Parser("benchmarks.attention", __doc__, examples)
    run, data, output = parser.group(RUN), parser.group(DATA), parser.group(OUTPUT)
    run.add_argument("--shape", choices=tuple(SHAPES), default="7b", help="(default: %(default)s)")
    run.add_argument("--dtype", choices=tuple(FLOATS), default="bfloat16", help="(default: %(default)s)")
    run.add_argument("--repetitions", type=positive, default=20, help="counted ones (default: %(default)s)")
    data.add_argument(
        "--batch-sizes", nargs="+", type=positive, default=[1, 8], metavar="B", help="prompts at a time (default: 1 8)"
    )
    output.add_argument("--out", type=Path, default=Path("runs/attention"), help="folder (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
