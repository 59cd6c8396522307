"""Whether DeepStack is why reroute loses: PDrop's schedule on Qwen3-VL, by who gets the features and when it decides.

    python -m benchmarks.deepstack --budgets 1/3

asks the same referring expressions under every schedule, at equal visual tokens: deleting, rerouting with each answer
to who gets what DeepStack adds (`deepstack`), leaving the losers in the sequence without return (`layout`), and the
same with the first decision behind the last addition ("late"). Differences are paired.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.found_schedules import BOXES, FULL, Contender, answered, boxes, costs, points
from convert.embedded import EMBEDDED
from evals.harness.cli import load_model
from evals.harness.identity import versions
from evals.harness.metrics import Resampler, difference, interval, means
from evals.table import listed
from reroute_jax.commandline.parsing import DATA, OUTPUT, RUN, Parser, budget, exit_code, positive, whole
from reroute_jax.engine.compilation import keep_programs
from reroute_jax.engine.model import Model
from reroute_jax.errors import RerouteError
from reroute_jax.nn.params import named_parameters, with_parameters
from reroute_jax.routing.budget import share_of
from reroute_jax.routing.found import FOUND, found_file

SILENT = "all tokens, nothing added"  # the model without what DeepStack adds: what it is worth at all
PDROP, EVERY = {"method": "pdrop"}, {"method": "fastv", "decisions": "every"}
# Plans of a budget. "late": with the first decision behind the last layer that DeepStack adds to.
ROUTES = {
    "delete": {**PDROP, "action": "delete"},
    "reroute": {**PDROP, "action": "reroute"},
    "reroute running": {**PDROP, "action": "reroute", "deepstack": "running"},
    "layout": {"method": "layout"},
    "late delete": {**PDROP, "action": "delete", "deepstack": "late"},
    "late reroute": {**PDROP, "action": "reroute", "deepstack": "late"},
    "late layout": {"method": "layout", "deepstack": "late"},
    "every delete": {**EVERY, "action": "delete"},
    "every reroute": {**EVERY, "action": "reroute"},
    "early every reroute": {**EVERY, "action": "reroute", "first_decision": 1},
    "early every reroute running": {**EVERY, "action": "reroute", "first_decision": 1, "deepstack": "running"},
}
# What is compared, the second of a pair from the first.
PAIRS = (
    ("reroute", "delete"),
    ("reroute running", "delete"),
    ("reroute", "reroute running"),
    ("layout", "delete"),
    ("reroute", "layout"),
    ("late reroute", "late delete"),
    ("late delete", "delete"),
    ("late reroute", "reroute"),
    ("every reroute", "every delete"),
    ("every reroute", "reroute"),
    ("every reroute", "early every reroute"),
    ("early every reroute", "early every reroute running"),
    (FOUND, "delete"),
    (FOUND, "reroute"),
    (FOUND, "every reroute"),
)
METRICS = (BOXES, "ACC@0.9", "IoU")


def runs_of(model: Model, budgets: Sequence[Any]) -> list[Contender]:
    """All tokens, and for every budget the routes and what a search found for it, where the checkpoint has that."""
    runs = [Contender(FULL, "", model.plan("none"))]
    for each in budgets:
        share = str(share_of(each, 10**6))
        routes = dict(ROUTES)
        if found_file(model.folder, each).is_file():
            routes[FOUND] = {"method": FOUND}
        for name, route in routes.items():
            if route.get("deepstack") == "late":
                route = {**route, "first_decision": model.config.decoder.deepstack}
            runs.append(Contender(f"{name} {share}", share, model.plan(budget=each, **route)))
    return runs


def silenced(model: Model) -> Model:
    """With mergers of DeepStack that give zeros."""
    values = {
        name: jnp.zeros_like(value) if name.startswith("vision.deepstack.") and ".fc2." in name else value
        for name, value in named_parameters(model.module).items()
    }
    return replace(model, module=with_parameters(model.module, values))


def scores_of(lines: Sequence[Mapping[str, Any]], run: str) -> np.ndarray:
    return np.array([[line["metrics"][run][name] for name in METRICS] for line in lines])


def summary_of(model: Model, runs: Sequence[Contender], lines, silent_lines, sizes: Counter) -> dict[str, Any]:
    """Means with their intervals and costs, and the paired differences of `PAIRS`."""
    resampler = Resampler(tuple(line["scene"] for line in lines))

    def told(scores: np.ndarray) -> dict[str, Any]:
        draws = resampler.means(scores)
        return {
            name: asdict(interval(value, draws[:, at]))
            for at, (name, value) in enumerate(zip(METRICS, means(scores), strict=True))
        }

    scores = {run.name: scores_of(lines, run.name) for run in runs}
    found: dict[str, Any] = {"questions": len(lines), "runs": {}, "differences": {}}
    for run in runs:
        found["runs"][run.name] = {
            "decisions": str(run.schedule.label),
            **told(scores[run.name]),
            **costs(model, run, sizes),
        }
    found["runs"][SILENT] = told(scores_of(silent_lines, FULL))
    for share in dict.fromkeys(run.budget for run in runs if run.budget):
        for first, second in ((f"{one} {share}", f"{other} {share}") for one, other in PAIRS):
            if first in scores and second in scores:
                pair = difference(scores[first], scores[second], resampler)
                found["differences"][f"{first} minus {second}"] = {
                    name: asdict(each) for name, each in zip(METRICS, pair, strict=True)
                }
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """Two tables a person can read, in points of ACC@0.5."""
    rows = ["| schedule | tokens | ACC@0.5 |", "|---|---|---|"]
    for name, run in found["runs"].items():
        tokens = f"{run['tokens']:.1f}" if "tokens" in run else "all"
        rows.append(f"| {name} | {tokens} | {points(run[BOXES])} |")
    rows += ["", "| difference | points of ACC@0.5 |", "|---|---|"]
    rows += [f"| {name} | {points(pair[BOXES], '+')} |" for name, pair in found["differences"].items()]
    return "\n".join(rows)


def measure(args) -> None:
    if args.compilation_cache is not None:
        keep_programs(args.compilation_cache)
    model = load_model(args.model, None)
    if not model.config.decoder.deepstack:
        raise RerouteError(f"{args.model} has no DeepStack: give --model a Qwen3-VL")
    task = boxes(model, args.start, args.limit)
    sizes = Counter(model.visual_grid(doc.image) for doc in task.docs(0))
    runs = runs_of(model, args.budgets)
    args.out.mkdir(parents=True, exist_ok=True)
    shares = "_".join(dict.fromkeys(run.budget.replace("/", "-") for run in runs if run.budget))
    file = args.out / f"deepstack_{Path(args.model).name}_{shares}.jsonl"
    lines = answered(model, task, runs, file, args.batch_size)
    silent = args.out / f"deepstack_{Path(args.model).name}_nothing_added.jsonl"
    silent_lines = answered(silenced(model), task, runs[:1], silent, args.batch_size)
    found = summary_of(model, runs, lines, silent_lines, sizes)
    about = {"model": args.model, "start": args.start, "versions": versions()}
    file.with_suffix(".json").write_text(json.dumps(found | about, indent=1) + "\n")
    print(markdown(found))


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return exit_code(lambda: measure(args), args.debug, "stopped: the same command goes on after the last whole batch")


def _parser() -> Parser:
    parser = Parser(
        "benchmarks.deepstack", __doc__.splitlines()[0], ("", "--budgets 1/3,2/9", "--limit 200 --out runs")
    )
    run, data, output = (parser.group(title) for title in (RUN, DATA, OUTPUT))
    run.add_argument("--model", default=EMBEDDED[-1], help="a Qwen3-VL (default: %(default)s)")
    run.add_argument(
        "--budgets", type=partial(listed, budget), default=(budget("1/3"),), metavar="A,B", help="(default: 1/3)"
    )
    run.add_argument("--batch-size", type=positive, default=32, help="(default: %(default)s)")
    run.add_argument("--compilation-cache", type=Path, metavar="DIR", help="keep compiled programs there")
    data.add_argument("--start", type=whole, default=1000, help="first test scene (default: %(default)s)")
    data.add_argument("--limit", type=positive, default=1000, help="questions (default: %(default)s)")
    output.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
