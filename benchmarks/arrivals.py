"""`python -m benchmarks.arrivals --rate 8 --requests 2000`

Questions about rendered scenes arrive at random, `--rate` a second on average (a Poisson process), and wait for the
engine, which answers all that wait at once, up to a batch. Prints p50 and p99 of the time from arrival to answer, how
many programs were compiled after the warm-up, and resident memory along the way.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from convert.embedded import EMBEDDED
from evals.harness.cli import load_model
from evals.harness.prompts import rec
from evals.scenes.data import refcoco_rows
from reroute_jax.commandline.loading import add_bits_arguments, add_mesh_argument, load_options
from reroute_jax.commandline.parsing import (
    DATA,
    ROUTE,
    RUN,
    Parser,
    budget,
    exit_code,
    new_tokens,
    positive,
    positive_number,
    whole,
)
from reroute_jax.engine.compilation import compilations, keep_programs
from reroute_jax.engine.model import Model
from reroute_jax.models import FAMILIES
from reroute_jax.routing.methods import METHODS
from reroute_jax.routing.plan import Schedule

REPORTS = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 after one line on bad input."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: print(json.dumps(measure(args), indent=2)), args.debug)


def measure(args) -> dict[str, Any]:
    start = time.perf_counter()
    if args.compilation_cache is not None:
        keep_programs(args.compilation_cache)
    model = load_model(args.model, None, **load_options(args))
    options = {
        "schedule": _schedule(model, args),
        "max_new_tokens": args.new_tokens,
        "batch_size": args.batch_size,
    }
    pairs = _questions(model.config.family, args.scenes)
    loaded = time.perf_counter()
    with compilations() as ahead:
        model.warm_up(pairs, **options)
    warm = time.perf_counter()
    arrivals = np.cumsum(np.random.default_rng(args.seed).exponential(1 / args.rate, args.requests))
    with compilations() as later:
        latencies, memory = serve(arrivals, list(islice(cycle(pairs), args.requests)), model, options)
    return {
        "requests": args.requests,
        "rate_per_s": args.rate,
        "load_s": loaded - start,
        "warm_up_s": warm - loaded,
        "programs": len(ahead),
        "programs_compiled_later": len(later),
        "latency_p50_ms": 1e3 * float(np.percentile(latencies, 50)),
        "latency_p99_ms": 1e3 * float(np.percentile(latencies, 99)),
        "served_per_s": args.requests / (float(arrivals[-1]) + latencies[-1]),
        "resident_mb": memory,
        "growth_mb": memory[-1] - memory[0],
    }


def serve(
    arrivals: np.ndarray,
    pairs: Sequence[tuple],
    model,
    options: dict[str, Any],
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[list[float], list[float]]:
    """Seconds from arrival to answer of each request, and resident MB after each tenth of them.

    arrivals: seconds from the start, ascending. options: of `model.generate`, batch_size among them.
    """
    start, latencies, memory, served = clock(), [], [], 0
    while served < len(arrivals):
        now = clock() - start
        if arrivals[served] > now:
            sleep(arrivals[served] - now)
            continue
        waiting = int(np.searchsorted(arrivals, now, side="right"))
        batch = slice(served, min(waiting, served + options["batch_size"]))
        model.generate(pairs[batch], **options)
        done = clock() - start
        latencies += [done - arrived for arrived in arrivals[batch]]
        while len(memory) < REPORTS * len(latencies) // len(arrivals):
            memory.append(resident_mb())
        served = batch.stop
    return latencies, memory


def resident_mb() -> float:
    """Of this process, on Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _questions(family: str, scenes: int) -> list[tuple]:
    rows = refcoco_rows("test", scenes, family=family)
    style = FAMILIES[family].evaluation.rec_style
    return [(row["image"], rec(row["answer"][0], style)) for row in rows]


def _schedule(model: Model, args) -> Schedule:
    if args.schedule is None:
        return model.plan(args.method, **({"budget": args.budget} if METHODS[args.method].has_budget else {}))
    schedule = Schedule.from_file(args.schedule)
    schedule.check_depth(model.config.num_layers)
    return schedule


def _parser() -> Parser:
    examples = ("--rate 8 --requests 2000", "--model scenes-qwen --method fastv", "--rate 2 --batch-size 1 --scenes 20")
    parser = Parser("benchmarks.arrivals", __doc__, examples)
    run, data, route = parser.group(RUN), parser.group(DATA), parser.group(ROUTE)
    run.add_argument("--model", default=EMBEDDED[0], help="(default: %(default)s)")
    add_mesh_argument(parser)
    add_bits_arguments(parser)
    run.add_argument("--batch-size", type=positive, default=8, help="at most (default: %(default)s)")
    run.add_argument("--new-tokens", type=new_tokens, default=16, help="of each answer (default: %(default)s)")
    run.add_argument("--compilation-cache", type=Path, metavar="DIR", help="keep compiled programs there")
    data.add_argument("--rate", type=positive_number, default=8.0, help="requests a second (default: %(default)s)")
    data.add_argument("--requests", type=positive, default=2000, help="how many arrive (default: %(default)s)")
    data.add_argument("--scenes", type=positive, default=200, help="different ones (default: %(default)s)")
    data.add_argument("--seed", type=whole, default=0, help="of the arrivals (default: %(default)s)")
    route.add_argument("--method", choices=tuple(METHODS), default="pdrop", help="(default: %(default)s)")
    route.add_argument("--budget", type=budget, default=128, help="192, 128, 64 or a share (default: %(default)s)")
    route.add_argument("--schedule", type=Path, metavar="FILE", help="one that was written down, instead of the method")
    return parser


if __name__ == "__main__":
    sys.exit(main())
