"""What parts that no search knows add to a schedule that was found, at equal tokens.

    python -m benchmarks.beyond --model scenes-qwen

runs the checkpoint's own found schedule, and beside it the same with a grid that always stays, behind a reduction
before the decoder, and with repairs. What a part spends is taken off all keep counts alike. Differences are those to
the found schedule on the same questions.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from typing import Any

import numpy as np

from benchmarks.found_schedules import (
    BOXES,
    FULL,
    Contender,
    add_found_budget_argument,
    add_run_arguments,
    add_scene_arguments,
    answered,
    boxes,
    costs,
    macs,
    points,
)
from evals.harness.cli import load_model
from evals.harness.identity import versions
from evals.harness.metrics import Resampler, difference
from evals.searching.candidates import Budget, Candidate, Space, repaired
from reroute_jax.commandline.loading import add_mesh_argument
from reroute_jax.commandline.parsing import Parser, exit_code
from reroute_jax.engine.compilation import keep_programs
from reroute_jax.errors import RerouteError
from reroute_jax.routing.budget import share_of
from reroute_jax.routing.cost import visual_per_layer
from reroute_jax.routing.divprune import DivPrune
from reroute_jax.routing.floors import StrideGrid
from reroute_jax.routing.found import FOUND
from reroute_jax.routing.merge import Merge
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.pool import PoolMerge
from reroute_jax.types import Grid

METRICS = (BOXES, "ACC@0.9")
STRIDES = (4, 3)
SHARES = (Fraction(3, 4), Fraction(1, 2))
REPAIRS = ("proxy_offset", "mean_offset")


def variants(found: Schedule, grid: Grid) -> dict[str, Schedule]:
    """The found schedule and what is made of it, of a reference image of (rows, columns). Variants that equal the found
    schedule are left out."""
    space = Space(found.num_layers, grid[0] * grid[1])
    candidate = space.candidate(found)
    made = {FOUND: space.schedule(candidate)}
    made |= {f"grid of stride {stride}": with_floor(made[FOUND], stride, grid) for stride in STRIDES}
    for share in SHARES:
        made[f"divprune {share}"] = behind(DivPrune(share), candidate, space, grid)
        made[f"pool {share}"] = behind(PoolMerge(share), candidate, space, grid)
    made |= {repair: with_repair(candidate, repair, space) for repair in REPAIRS}
    labelled = {name: replace(schedule, label=f"{FOUND} + {name}") for name, schedule in made.items() if name != FOUND}
    same = [name for name in labelled if made[name] == made[FOUND]]
    return {FOUND: made[FOUND]} | {name: one for name, one in labelled.items() if name not in same}


def with_floor(schedule: Schedule, stride: int, grid: Grid) -> Schedule:
    """A grid of every `stride`-th row and column inside the count of those decisions that keep at least twice as
    many."""
    rows, cols = grid
    held = -(-rows // stride) * -(-cols // stride)

    def floored(stage):
        room = stage.decides and stage.keep(rows * cols) >= 2 * held
        return replace(stage, floor=StrideGrid(stride)) if room else stage

    return replace(schedule, stages=tuple(map(floored, schedule.stages)))


def behind(merge: Merge, candidate: Candidate, space: Space, grid: Grid) -> Schedule:
    """The candidate's decisions on what a merge leaves."""
    left = Space.behind(merge, space.num_layers, grid)
    return left.schedule(spending(token_layers(space.schedule(candidate), space), left.schedule, candidate, left))


def with_repair(candidate: Candidate, repair: str, space: Space) -> Schedule:
    """The candidate with a repair behind each decision that reroutes."""

    def schedule(one: Candidate) -> Schedule:
        plain = space.schedule(one)
        stages = [replace(stage, repair=repair if stage.action == "reroute" else None) for stage in plain.stages]
        return replace(plain, stages=tuple(stages))

    return schedule(spending(token_layers(space.schedule(candidate), space), schedule, candidate, space))


def spending(tokens: int, schedule: Callable[[Candidate], Schedule], candidate: Candidate, space: Space) -> Candidate:
    """The candidate with all keep counts scaled alike, so that its schedule spends so many token-layers. Raises
    RerouteError where they are too few for it."""
    everything = space.num_layers * space.visual
    limit = Budget(Fraction(tokens, everything), lambda one: Fraction(token_layers(schedule(one), space), everything))
    found = repaired(candidate, space, limit)
    if found is None:
        raise RerouteError(f"{candidate} cannot spend {tokens} token-layers of {everything}: take a larger --budget")
    return found


def token_layers(schedule: Schedule, space: Space) -> int:
    """Visual tokens that run, summed over the layers."""
    return sum(visual_per_layer(schedule, space.visual))


def summary_of(
    model, runs: Sequence[Contender], lines: Sequence[Mapping[str, Any]], sizes: Counter
) -> dict[str, dict[str, Any]]:
    """Of each run means, costs, and differences to the found schedule."""
    labels = tuple(line["scene"] for line in lines)
    scores = {
        run.name: np.array([[line["metrics"][run.name][name] for name in METRICS] for line in lines]) for run in runs
    }
    told = {}
    for run in runs:
        means = dict(zip(METRICS, scores[run.name].mean(axis=0).tolist(), strict=True))
        told[run.name] = {"schedule": run.schedule.label, **means, **costs(model, run, sizes)}
        if run.name not in (FULL, FOUND):
            pairs = difference(scores[run.name], scores[FOUND], Resampler(labels))
            told[run.name]["minus_found"] = {name: asdict(one) for name, one in zip(METRICS, pairs, strict=True)}
    return told


def markdown(told: Mapping[str, Mapping[str, Any]]) -> str:
    """A table a person can read."""
    header = ["run", "tokens per layer", "prefill + scoring (+ merging), M MACs", *METRICS, "minus found (95%)"]
    rows = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, run in told.items():
        said = points(run["minus_found"][BOXES], "+") if "minus_found" in run else ""
        numbers = [f"{100 * run[metric]:.1f}" for metric in METRICS]
        rows.append("| " + " | ".join([name, f"{run['tokens']:.2f}", macs(run), *numbers, said]) + " |")
    return "\n".join(rows)


def measure(args) -> None:
    if args.compilation_cache is not None:
        keep_programs(args.compilation_cache)
    model = load_model(args.model, None, mesh=args.mesh)
    task = boxes(model, args.start, args.limit)
    sizes = Counter(model.visual_grid(doc.image) for doc in task.docs(0))
    made = variants(model.plan(FOUND, budget=args.budget), model.reference_grid)
    share = str(share_of(args.budget, 10**6))
    runs = [Contender(FULL, "", model.plan("none")), *(Contender(name, share, one) for name, one in made.items())]
    file = args.out / f"beyond_{args.model}_{share.replace('/', '-')}.jsonl"
    told = summary_of(model, runs, answered(model, task, runs, file, args.batch_size), sizes)
    about = {"model": args.model, "start": args.start, "questions": args.limit, "versions": versions()}
    file.with_suffix(".json").write_text(json.dumps(about | {"runs": told}, indent=1) + "\n")
    print(markdown(told))


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return exit_code(lambda: measure(args), args.debug, "stopped: the same command goes on after the last whole batch")


def _parser() -> Parser:
    examples = ("", "--model scenes-qwen", "--budget 1/3 --start 5000 --limit 200 --out runs")
    parser = Parser("benchmarks.beyond", __doc__.splitlines()[0], examples)
    add_run_arguments(parser)
    add_scene_arguments(parser, limit=500)
    add_found_budget_argument(parser)
    add_mesh_argument(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
