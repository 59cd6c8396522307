"""What each lever of a schedule is worth alone, at equal visual tokens. `python -m evals.levers --help`.

Positions, coverage, decision layers, score and what becomes of the losers, every level with every level of the others,
on the same RefCOCO questions. Runs have folders of their own, as those of `evals.table`: what is there is not asked
again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.embedded import EMBEDDED
from evals.harness.cli import add_compat_argument, add_fresh_argument, exit_code_of, load_model
from evals.harness.data import SCENES
from evals.harness.lever_figure import draw
from evals.harness.levers import LEVERS, Cell, Effect, cells, effects
from evals.harness.matrix import Outcome
from evals.harness.routes import FULL, Routes, named_run
from evals.harness.run_folder import locked
from evals.harness.runner import Run
from evals.table import OpenedTask, listed, opened_task, outcome
from reroute_jax.commandline.loading import add_bits_arguments, add_mesh_argument, load_options
from reroute_jax.commandline.parsing import DATA, OUTPUT, ROUTE, RUN, Parser, budget, positive, whole
from reroute_jax.errors import RerouteError
from reroute_jax.routing.budget import share_of
from reroute_jax.routing.found import FOUND
from reroute_jax.types import FLOATS

METRIC = "refcoco_ACC@0.5"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = _parser().parse_args(argv)
    return exit_code_of(lambda: _run(args), args)


def _parser() -> Parser:
    examples = (
        "--budgets 2/9 --limit 200",
        "--models scenes-llava,scenes-qwen --levels positions=original score=last_token,last_token_unrotated",
        "--budgets 1/3,2/9 --out runs/levers",
    )
    parser = Parser("evals.levers", "What each lever of a schedule is worth alone.", examples)
    run, data, route = parser.group(RUN), parser.group(DATA), parser.group(ROUTE)
    run.add_argument(
        "--models",
        type=partial(listed, str),
        default=EMBEDDED[:1],
        metavar="A,B",
        help=f"hub ids, folders, or embedded ones: {', '.join(EMBEDDED)} (default: {EMBEDDED[0]})",
    )
    run.add_argument("--dtype", choices=tuple(FLOATS), help="as of the other commands")
    add_mesh_argument(parser)
    add_bits_arguments(parser)
    run.add_argument("--batch-size", type=positive, default=8, help="questions at a time (default: %(default)s)")
    run.add_argument("--seed", type=whole, default=0, help="of the intervals (default: %(default)s)")
    data.add_argument(
        "--data", default=SCENES, help=f"'{SCENES}' or a folder, as of evals.table (default: %(default)s)"
    )
    data.add_argument("--limit", type=positive, default=1000, help="expressions (default: %(default)s)")
    route.add_argument("--budgets", type=partial(listed, budget), default=(128,), metavar="A,B", help="(default: 128)")
    route.add_argument(
        "--levels",
        nargs="+",
        type=_levels,
        default=[],
        metavar="LEVER=A,B",
        help="levels, the first being what others are held against "
        f"(default: all but {FOUND}, the decision layers of the schedule that a search found for the budget): "
        + "; ".join(f"{lever}={','.join(levels)}" for lever, levels in LEVERS.items()),
    )
    add_compat_argument(parser)
    parser.group(OUTPUT).add_argument(
        "--out", type=Path, default=Path("runs/levers"), help="folder (default: %(default)s)"
    )
    add_fresh_argument(parser)
    return parser


def _levels(text: str) -> tuple[str, tuple[str, ...]]:
    lever, _, levels = text.partition("=")
    if lever not in LEVERS:
        raise argparse.ArgumentTypeError(f"{lever!r} is not one of {', '.join(LEVERS)}")
    found = listed(str, levels)
    unknown = [level for level in found if level not in LEVERS[lever]]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(LEVERS[lever])}")
    return lever, found


def _run(args: argparse.Namespace) -> None:
    args.skip_bad = False
    levers = {lever: tuple(level for level in levels if level != FOUND) for lever, levels in LEVERS.items()}
    levers |= dict(args.levels)
    if all(len(levels) == 1 for levels in levers.values()):
        raise RerouteError("every lever has one level only, expected one with two to compare: give more --levels")
    task = opened_task("refcoco", args)
    with locked(args.out):
        results = {model: _of_model(model, levers, task, args) for model in args.models}
        rows = [row for found in results.values() for row in found]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (args.out / "effects.jsonl").write_text(lines)
        text = table(rows)
        (args.out / "levers.md").write_text(text)
        draw(rows, args.out / "levers.svg")
    print(f"{text}\neffects.jsonl, levers.md, levers.svg, answers and summaries: {args.out}")


def _of_model(name: str, levers: Mapping[str, Sequence[str]], task: OpenedTask, args: argparse.Namespace) -> list[dict]:
    model = load_model(name, args.dtype, args.mrope_compat, **load_options(args))
    rows, cols = model.reference_grid
    by_budget: dict[str, dict[Run, Cell]] = {}
    for share in args.budgets:
        layers = [stage.lo for stage in model.plan(FOUND, budget=share).decisions] if FOUND in levers["layers"] else ()
        of_all = share_of(share, rows * cols)
        made = cells(levers, model.config.num_layers, (rows, cols), of_all, str(share), layers)
        by_budget[str(share)] = {named_run(cell.schedule): cell for cell in made}
    runs = [run for found in by_budget.values() for run in found]
    print(f"{name}: {len(runs)} combinations of levels", flush=True)
    full = Run(FULL, model.plan("none"))
    done = outcome(name, model, Routes((full, *runs), ()), task, args)
    jax.clear_caches()
    return [
        {"model": name, "budget": share} | row
        for share, of_budget in by_budget.items()
        for row in worth_of_levels(done, of_budget, levers)
    ]


def worth_of_levels(done: Outcome, of_budget: Mapping[Run, Cell], levers: Mapping[str, Sequence[str]]) -> list[dict]:
    """One line for each effect, with the questions and tokens that all lines of a budget stand on."""
    scored = done.scored
    place = scored.names.index(METRIC)
    metric = {cell: scored.estimate(scored.columns[run.name])[:, place] for run, cell in of_budget.items()}
    tokens = [done.cost(run.name, "average_visual_tokens") for run in of_budget]
    about = {
        "questions": scored.questions,
        "tokens_least": min(tokens),
        "tokens_most": max(tokens),
        "full": float(np.mean(scored.estimate(scored.columns[FULL])[:, place])),
        "mean": float(np.mean(list(metric.values()))),
    }
    return [about | record(effect) for effect in effects(metric, levers, scored.resampler)]


def record(effect: Effect) -> dict[str, Any]:
    """JSON form, points of accuracy in per cent."""
    worth = {end: None if value is None else 100 * value for end, value in asdict(effect.worth).items()}
    return {**asdict(effect), "worth": worth}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line for each level, model and budget."""
    lines = [
        "| model | budget | lever | level | instead of | points of ACC@0.5 (95 %) | under delete | under reroute "
        "| more with recovery |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    grouped: dict[tuple, dict[str, Mapping]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("model", "budget", "lever", "level", "against"))
        grouped.setdefault(key, {})[row["within"]] = row["worth"]
    for key, worth in grouped.items():
        cells = [_shown(worth.get(within)) for within in ("all", "delete", "reroute", "reroute minus delete")]
        lines.append(f"| {' | '.join([*key, *cells])} |")
    return "\n".join(lines) + "\n"


def _shown(worth: Mapping[str, float] | None) -> str:
    if worth is None:
        return ""
    bounds = "" if worth["low"] is None else f" ({worth['low']:+.1f} to {worth['high']:+.1f})"
    return f"{worth['value']:+.1f}{bounds}"


if __name__ == "__main__":
    sys.exit(main())
