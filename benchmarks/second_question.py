"""`python -m benchmarks.second_question --model scenes-llava --images 20`

What a later question about the same image costs with an image cache: the time to its first token beside a fresh run's,
of a model that runs here; or FLOPs by XLA's count of the lowered programs, of a shape without weights (`--random
llava-1.5-7b`). A plan is METHOD, METHOD:BUDGET or METHOD:BUDGET:ACTION, and behind an @ the layer of its first
decision: what runs before it is shared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from benchmarks.load import TEXTS
from evals.harness.cli import load_model
from evals.scenes.data import refcoco_rows
from evals.speed.checkpoint_shapes import SHAPES
from evals.speed.subjects import Sample, Subject, open_subject, sample
from reroute_jax.buckets import TEXT_BUCKETS, bucket
from reroute_jax.commandline.parsing import OUTPUT, ROUTE, RUN, Parser, argument_of, exit_code, positive, whole
from reroute_jax.engine import programs
from reroute_jax.engine.model import Model
from reroute_jax.prefix import Opening
from reroute_jax.routing.plan import Schedule
from reroute_jax.serving.plans import plan_words
from reroute_jax.types import FLOATS

PLANS = ("none", "pdrop:2/9:delete", "pdrop:2/9:reroute")
COLUMNS = ("model", "plan", "shared layers", "fresh", "first question", "later ones", "fresh / later", "MB an image")


@dataclass(frozen=True)
class NamedPlan:
    """options: of `Model.plan`."""

    text: str
    method: str
    options: dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 after one line on bad input."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    records = []
    with args.out.open("a") as file:
        for record in tqdm(measured(args), total=len(args.plans), unit="plan"):
            records.append(record)
            file.write(json.dumps(record) + "\n")
            file.flush()
    print(table(records))


def measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A record of each plan: milliseconds to the first token, or TFLOPs up to it."""
    subject = open_subject(args, shapes_only=True) if args.random else None
    model = subject.model if args.random else load_model(args.model, args.dtype)
    for plan in args.plans:
        schedule = (subject or model).plan(plan.method, **plan.options)
        of = {"model": args.random or args.model, "dtype": model.dtype, "plan": plan.text}
        of["shared_layers"] = schedule.resolve(1).undecided
        yield of | (flops(subject, schedule) if args.random else seconds(model, schedule, args.images))


def seconds(model: Model, schedule: Schedule, images: int) -> dict[str, Any]:
    """Medians over images, of two questions about each, from the opened image to the first token, of later ones from
    the fitted one. A round before them does not count."""
    times: dict[str, list[float]] = {"fresh": [], "first": [], "later": []}
    cache = model.image_cache(2**32)
    ask = partial(model.answer, schedule=schedule, max_new_tokens=1)
    rows = [(row["image"], row["answer"][0]) for row in refcoco_rows("test", images)]
    for number, (image, name) in enumerate([rows[0], *rows]):
        cache.clear()
        first, second = (text.format(name) for text in TEXTS[:2])
        for kind, question, how in (
            ("fresh", (image, second), {}),
            ("first", (image, first), {"image_cache": cache}),
            ("later", (model.image(image), second), {"image_cache": cache}),
        ):
            spent = _spent(lambda question=question, how=how: ask([question], **how))
            if number:
                times[kind].append(1000 * spent)
    medians = {f"{kind}_ms": round(statistics.median(values), 2) for kind, values in times.items()}
    speed_up = round(medians["fresh_ms"] / medians["later_ms"], 2)
    return medians | {"images": images, "speed_up": speed_up, "image_bytes": cache.nbytes}


def _spent(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def flops(subject: Subject, schedule: Schedule) -> dict[str, Any]:
    """Of a prompt with one image, by XLA before optimisation, lowered for the CPU; nothing runs."""
    weights, given = subject.model.weights, sample(subject, 1)
    decoder, batch = weights.decoder, given.batch(subject.model, schedule)
    length = 1 + subject.visual  # `sample` puts the image behind one token of text
    opening = Opening.of(batch.plan, subject.config.decoder.deepstack)
    undecided = Schedule.from_decisions((), (), schedule.num_layers, merge=schedule.merge)
    first = Sample(given.ids[:, :length], given.pixels, given.thw).batch(subject.model, undecided)
    encode = programs.encode.jitted("cpu").lower(weights, batch.images)
    features, anchors = encode.out_info
    fresh = programs.prefill.jitted("cpu").lower(decoder, batch.prompt, features, anchors, batch.plan)
    prefix = programs.run_prefix.jitted("cpu").lower(decoder, first.prompt, features, anchors, opening)
    starts, index = np.array([length], np.int32), np.zeros(batch.prompt.ids.shape, np.int32)
    size = bucket(subject.text - 1, TEXT_BUCKETS, "the text")
    behind = programs.prefill_behind.jitted("cpu").lower(
        decoder, batch.prompt, prefix.out_info, starts, index, batch.plan, size
    )
    tower, prompt, shared, later = (one.cost_analysis()["flops"] / 1e12 for one in (encode, fresh, prefix, behind))
    costs = {"tower": tower, "fresh": tower + prompt, "first": tower + shared + later, "later": later}
    states = jax.tree.leaves(prefix.out_info)
    return {
        "text": subject.text,
        "visual": subject.visual,
        **{f"{name}_tflops": float(f"{value:.4g}") for name, value in costs.items()},
        "speed_up": round(costs["fresh"] / later, 2),
        "image_bytes": sum(one.size * one.dtype.itemsize for one in states),
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for one in records:
        key, unit = ("ms", "ms") if "fresh_ms" in one else ("tflops", "TFLOPs")
        costs = [f"{one[f'{kind}_{key}']:.3g} {unit}" for kind in ("fresh", "first", "later")]
        cells = [one["model"], one["plan"], one["shared_layers"], *costs, one["speed_up"]]
        lines.append(f"| {' | '.join(map(str, cells))} | {one['image_bytes'] / 1e6:.3g} |")
    return "\n".join(lines)


@argument_of
def _plan(text: str) -> NamedPlan:
    """argparse type: METHOD, METHOD:BUDGET or METHOD:BUDGET:ACTION, each with @LAYER behind it or not."""
    words, at, layer = text.partition("@")
    method, budget, action = plan_words(words)
    given = {"budget": budget, "action": action, "first_decision": whole(layer) if at else None}
    return NamedPlan(text, method, {name: value for name, value in given.items() if value is not None})


def _parser() -> Parser:
    examples = (
        "--model scenes-llava --images 20",
        "--random llava-1.5-7b --dtype bfloat16 --plans none pdrop:2/9 fastv:0.55@16",
    )
    parser = Parser("benchmarks.second_question", __doc__, examples)
    run = parser.group(RUN)
    which = run.add_mutually_exclusive_group()
    which.add_argument("--model", default="scenes-llava", help="(default: %(default)s)")
    which.add_argument("--random", choices=tuple(SHAPES), help="FLOPs of this shape, without weights")
    run.add_argument("--dtype", choices=tuple(FLOATS), help="(default: the checkpoint's, float32 for random)")
    run.add_argument("--images", type=positive, default=20, help="that are timed (default: %(default)s)")
    run.add_argument("--text", type=positive, default=64, help="text tokens, with --random (default: %(default)s)")
    run.add_argument("--grid", type=positive, nargs=2, help="visual tokens, with --random and Qwen (default: 24 24)")
    parser.group(ROUTE).add_argument(
        "--plans",
        nargs="+",
        type=_plan,
        default=[_plan(plan) for plan in PLANS],
        metavar="PLAN",
        help=f"(default: {' '.join(PLANS)})",
    )
    parser.group(OUTPUT).add_argument(
        "--out",
        type=Path,
        default=Path("runs/second_question.jsonl"),
        help="JSON lines, one more for each plan (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
