"""What schedules that were found are worth beside those that are set by hand, on scenes that nothing has used.

    python -m benchmarks.found_schedules --found evals/scenes/checkpoints/scenes-llava/found_*.json

takes files as `evals.search --budget 1/3,2/9,1/9 --seeds 3` writes them, with the best schedule of every seed. A
hand-set schedule gets the smallest budget at which it spends at least the tokens of each found one, or with
`--equal macs` the multiply-accumulates: it may have more, never fewer. Differences are those to the best of them on the
very questions of the table.
"""

from __future__ import annotations

import json
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from convert.embedded import EMBEDDED
from evals import refcoco, scenes_vqa
from evals.harness import vqa
from evals.harness.cli import load_model
from evals.harness.data import Doc, DocSource
from evals.harness.identity import versions
from evals.harness.metrics import Resampler, difference
from evals.harness.runner import Task
from evals.scenes.data import refcoco_rows, vqa_rows
from evals.scenes.world import SPLIT_LENGTH
from evals.searching.answers import Chunk
from evals.searching.candidates import HAND_SET, Candidate, Space, merge_of
from reroute_jax.commandline.loading import add_mesh_argument
from reroute_jax.commandline.parsing import DATA, OUTPUT, ROUTE, RUN, Parser, budget, exit_code, positive, whole
from reroute_jax.engine.batching import largest, lay_out
from reroute_jax.engine.compilation import keep_programs
from reroute_jax.engine.model import Model
from reroute_jax.errors import RerouteError
from reroute_jax.models import FAMILIES
from reroute_jax.routing.cost import Account
from reroute_jax.routing.plan import Schedule

FULL, FOUND, MINUS_FIRST = "all tokens", "found", "minus the first found"
BY_HAND = HAND_SET | {
    "layout": {"method": "layout"},
    "nuwa delete": {"method": "nuwa", "action": "delete"},
    "nuwa reroute": {"method": "nuwa", "action": "reroute"},
}
TEXT = 16  # tokens beside the image's, for the costs
# What a schedule spends on a row: visual tokens a layer, or multiply-accumulates with scoring and merging.
SPENT: dict[str, Callable[[Account], float]] = {
    "tokens": lambda account: account.average,
    "macs": lambda account: account.prompt.total() + account.merging,
}
# Of a budget, from where a hand-set schedule is given more until it spends enough: of tokens it has all in any case.
LEAST, MOST, STEP = {"tokens": Fraction(1), "macs": Fraction(1, 2)}, Fraction(9, 5), Fraction(1, 200)
BOXES, KINDS = "ACC@0.5", tuple(f"exact_match_{kind}" for kind in ("yesno", "colour", "count"))


@dataclass(frozen=True)
class Contender:
    """budget: that it competes under, empty for all tokens."""

    name: str
    budget: str
    schedule: Schedule


def runs_of(model: Model, found: Sequence[Mapping[str, Any]], sizes: Counter, equal: str = "tokens") -> list[Contender]:
    """All tokens; of every budget what each seed found, and every hand-set schedule that may spend as much. found: what
    the search's files tell. sizes: how often each grid comes among the questions. equal: of SPENT."""
    runs = [Contender(FULL, "", model.plan("none"))]

    def spent(schedule: Schedule) -> float:
        return mean_cost(accounts_of(model, schedule, sizes), sizes, SPENT[equal])

    for share in dict.fromkeys(about["budget"] for about in found):
        searched = [one for about in found if about["budget"] == share for one in _searched(model, about)]
        most = max(spent(run.schedule) for run in searched)
        budgets = budgets_of(Fraction(share), LEAST[equal])
        by_hand = {name: spending_at_least(model, route, budgets, most, spent) for name, route in BY_HAND.items()}
        runs += searched
        runs += [Contender(f"{name} {share}", share, one) for name, one in by_hand.items() if one is not None]
    names = [run.name for run in runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RerouteError(f"{twice[0]} is in two files, give one of them")
    return runs


def _searched(model: Model, about: Mapping[str, Any]) -> Iterator[Contender]:
    """What each seed of a search's file found, and behind a reduction what the search held against it."""
    share, behind = about["budget"], about.get("behind")
    space = Space.of(model, None if behind is None else merge_of(model, behind))
    where = f" for {'+'.join(about['tasks'])}" * (about["tasks"] != ["refcoco"]) + f" behind {behind}" * bool(behind)
    for search in about["searches"]:
        candidate = Candidate(*(tuple(search[part]) for part in ("layers", "keep", "actions")))
        yield Contender(f"{FOUND} {share} seed {search['seed']}{where}", share, space.schedule(candidate))
    if behind and about["hand_set"]:
        yield Contender(f"by hand {share}{where}", share, space.schedule(Candidate.parsed(about["hand_set"])))


def accounts_of(model: Model, schedule: Schedule, sizes: Counter) -> list[Account]:
    """Of the questions' grids."""
    return [model.cost(schedule, text=TEXT, grid=grid) for grid in sizes]


def mean_cost(accounts: Sequence[Account], sizes: Counter, of: Callable[[Account], float]) -> float:
    """Over the questions."""
    return float(np.average([of(one) for one in accounts], weights=list(sizes.values())))


def budgets_of(share: Fraction, least: Fraction) -> list[Fraction]:
    """Ascending, in steps of half a percent of a budget; none is more than all tokens."""
    steps = range(int((MOST - least) / STEP) + 1)
    return [budget for step in steps if (budget := share * (least + step * STEP)) <= 1]


def spending_at_least(
    model: Model,
    route: Mapping[str, str],
    budgets: Sequence[Fraction],
    least: float,
    spent: Callable[[Schedule], float],
) -> Schedule | None:
    """The route at the first of the ascending budgets at which it spends so much: by bisection, since more budget is
    more spent, and a budget that is out of its reach is too small."""

    def enough(budget: Fraction) -> bool:
        try:
            return spent(model.plan(budget=budget, **route)) >= least
        except RerouteError:
            return False

    place = bisect_left(budgets, True, key=enough)
    return None if place == len(budgets) else model.plan(budget=budgets[place], **route)


def answered(model: Model, task: Task, runs: Sequence[Contender], file: Path, batch_size: int) -> list[dict[str, Any]]:
    """One line a question in `file`, with the metrics of every run; what is there already is not asked again."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    names = [run.name for run in runs]
    if lines and list(lines[0]["metrics"]) != names:
        raise RerouteError(f"{file} has the answers of other runs: move it away")
    docs = list(task.docs(0))
    questions = [model.question((doc.image, task.prompt(doc))) for doc in docs]
    shape = largest([lay_out(one, model.config, runs[0].schedule).shape for one in questions])
    with open(file, "a") as out, tqdm(total=len(docs) * len(runs), unit="answer") as bar:
        bar.update(len(lines) * len(runs))
        for first in range(len(lines), len(docs), batch_size):
            chunk = Chunk(model, questions[first : first + batch_size], shape)
            own = docs[first : first + batch_size]
            found: list[dict[str, Any]] = [{} for _ in own]
            for run in runs:
                bar.set_description(run.name)
                for doc, metrics, text in zip(own, found, chunk.texts(run.schedule, task.max_new_tokens), strict=True):
                    metrics[run.name] = scored(task, doc, text)
                bar.update(len(own))
            fresh = [
                {"question_id": doc.question_id, "scene": doc.cluster or doc.question_id, "metrics": metrics}
                for doc, metrics in zip(own, found, strict=True)
            ]
            out.writelines(json.dumps(line) + "\n" for line in fresh)
            out.flush()
            lines += fresh
    return lines


def scored(task: Task, doc: Doc, text: str) -> dict[str, float]:
    metrics = task.score(text.strip(), doc)["metrics"]
    kept = {name.removeprefix("refcoco_"): value for name, value in metrics.items()}
    return {name: round(kept[name], 4) for name in (BOXES, "ACC@0.9", "IoU", *KINDS) if name in kept}


def boxes(model: Model, start: int, limit: int, split: str = "test") -> Task:
    """Referring expressions of a split's scenes from number `start` on."""
    family = FAMILIES[model.config.family]
    evaluation = family.evaluation
    source = _scenes(lambda: refcoco_rows(split, SPLIT_LENGTH - start, start, family.name), start, split)
    how = evaluation.rec_style, evaluation.coord_format, 0, refcoco.SCENES_MAX_NEW_TOKENS
    return refcoco.make_task(source, limit, *how)


def words(model: Model, start: int, limit: int) -> Task:
    """Yes/no, colour and counting questions of test scenes from number `start` on."""
    source = _scenes(lambda: vqa_rows("test", SPLIT_LENGTH - start, start=start, family=model.config.family), start)
    return vqa.make_task(scenes_vqa.BENCHMARK, source, limit, scenes_vqa.BENCHMARK.max_new_tokens)


def _scenes(rows: Callable[[], Iterator[Mapping[str, Any]]], start: int, split: str = "test") -> DocSource:
    return DocSource(f"scenes [{split}] from {start}", rows, None)


QUESTIONS = {"boxes": (boxes, (BOXES, "ACC@0.9", "IoU")), "words": (words, KINDS)}


def summary_of(
    model: Model, runs: Sequence[Contender], lines: Sequence[Mapping[str, Any]], metrics: Sequence[str], sizes: Counter
) -> dict[str, Any]:
    """Means, costs, and by metric what was found minus the best hand-set schedule of its budget, and minus what the
    first seed of the first file found for it."""
    labels = tuple(line["scene"] for line in lines)
    scores = {
        run.name: np.array([[line["metrics"][run.name].get(name, np.nan) for name in metrics] for line in lines])
        for run in runs
    }
    told: dict[str, Any] = {"questions": len(lines), "runs": {}, "found minus the best by hand": {}, MINUS_FIRST: {}}
    for run in runs:
        means = dict(zip(metrics, np.nanmean(scores[run.name], axis=0).tolist(), strict=True))
        told["runs"][run.name] = {
            "budget": run.budget,
            "schedule": str(run.schedule.label),
            **means,
            **costs(model, run, sizes),
        }
    for run in runs:
        if not run.name.startswith(FOUND):
            continue
        by_hand = [one for one in runs if one.budget == run.budget and not one.name.startswith(FOUND)]
        pairs = told["found minus the best by hand"][run.name] = {}
        for column, metric in enumerate(metrics):
            best = max(by_hand, key=lambda one: np.nanmean(scores[one.name][:, column]))
            own, other = (scores[one.name][:, column : column + 1] for one in (run, best))
            pairs[metric] = {"best": best.name, **asdict(difference(own, other, Resampler(labels))[0])}
        first = next(one for one in runs if one.budget == run.budget)
        if first != run:
            apart = difference(scores[run.name], scores[first.name], Resampler(labels))
            told[MINUS_FIRST][run.name] = {name: asdict(one) for name, one in zip(metrics, apart, strict=True)}
    return told


def costs(model: Model, run: Contender, sizes: Counter) -> dict[str, float]:
    of = {
        "tokens": lambda one: one.average,
        "prefill_macs": lambda one: one.prompt.swiglu,
        "scoring_macs": lambda one: one.prompt.scoring,
        "merging_macs": lambda one: one.merging,
        "kv_bytes": lambda one: one.kv_bytes,
    }
    accounts = accounts_of(model, run.schedule, sizes)
    return {name: mean_cost(accounts, sizes, part) for name, part in of.items()}


def measure(args) -> None:
    if args.compilation_cache is not None:
        keep_programs(args.compilation_cache)
    model = load_model(args.model, None, mesh=args.mesh)
    found = [json.loads(path.read_text()) for path in args.found]
    for name in args.questions:
        asked, metrics = QUESTIONS[name]
        task = asked(model, args.start, args.limit)
        docs = list(task.docs(0))
        sizes = Counter(model.visual_grid(doc.image) for doc in docs)
        runs = runs_of(model, found, sizes, args.equal)
        file = args.out / f"found_{args.model}_{name}{'' if args.equal == 'tokens' else f'_equal_{args.equal}'}.jsonl"
        lines = answered(model, task, runs, file, args.batch_size)
        told = summary_of(model, runs, lines, metrics, sizes) | {
            "model": args.model,
            "start": args.start,
            "equal": args.equal,
            "versions": versions(),
        }
        file.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
        print(markdown(told, metrics))


def markdown(told: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """A table a person can read."""
    rows = [
        "| run | schedule | tokens | prefill + scoring (+ merging), M MACs | "
        + " | ".join(metrics)
        + " | minus the best by hand (95%) | minus the first found |"
    ]
    rows.append("|---" * (6 + len(metrics)) + "|")
    for name, run in told["runs"].items():
        pair = told["found minus the best by hand"].get(name, {}).get(metrics[0])
        said = "" if pair is None else f"{points(pair, '+')}, {pair['best']}"
        minus_first = told[MINUS_FIRST].get(name, {}).get(metrics[0])
        said += f" | {'' if minus_first is None else points(minus_first, '+')}"
        numbers = " | ".join(f"{100 * run[metric]:.1f}" for metric in metrics)
        rows.append(f"| {name} | {run['schedule']} | {run['tokens']:.2f} | {macs(run)} | {numbers} | {said} |")
    return "\n".join(rows)


def points(of: Mapping[str, Any], sign: str = "") -> str:
    """Of accuracy: an `Interval` as a record has it. sign: "+" shows that of a positive number, too."""
    middle, *bounds = (of[part] for part in ("value", "low", "high"))
    shown = format(100 * middle, f"{sign}.1f")
    if None in bounds:
        return shown
    low, high = (format(100 * bound, f"{sign}.1f") for bound in bounds)
    return f"{shown} ({low} to {high})"


def macs(run: Mapping[str, Any]) -> str:
    """Millions of a run of `costs`: prefill, scoring, and merging where there is any."""
    parts = [run["prefill_macs"], run["scoring_macs"], *filter(None, [run["merging_macs"]])]
    return " + ".join(f"{part / 1e6:.1f}" for part in parts)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return exit_code(lambda: measure(args), args.debug, "stopped: the same command goes on after the last whole batch")


def add_run_arguments(parser: Parser) -> None:
    """Of a benchmark on an embedded model's found schedules: the model, how it runs, and where results go."""
    run = parser.group(RUN)
    run.add_argument("--model", choices=EMBEDDED, default=EMBEDDED[0], help="(default: %(default)s)")
    run.add_argument("--batch-size", type=positive, default=32, help="(default: %(default)s)")
    run.add_argument("--compilation-cache", type=Path, metavar="DIR", help="keep compiled programs there")
    parser.group(OUTPUT).add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="folder (default: %(default)s)"
    )


def add_scene_arguments(parser: Parser, limit: int) -> None:
    """Which test scenes are asked about, `limit` questions by default."""
    data = parser.group(DATA)
    data.add_argument("--start", type=whole, default=1000, help="first test scene (default: %(default)s)")
    data.add_argument("--limit", type=positive, default=limit, help="questions of each kind (default: %(default)s)")


def add_found_budget_argument(parser: Parser) -> None:
    """The budget of the checkpoint's own found schedule."""
    parser.group(ROUTE).add_argument(
        "--budget",
        type=budget,
        default=Fraction(2, 9),
        help="that the checkpoint has a found schedule for (default: %(default)s)",
    )


def _parser() -> Parser:
    examples = (
        "--found evals/scenes/checkpoints/scenes-llava/found_*.json",
        "--model scenes-qwen --found evals/scenes/checkpoints/scenes-qwen/found_*.json",
        "--found schedule.json --start 5000 --limit 200 --out runs",
    )
    parser = Parser("benchmarks.found_schedules", __doc__.splitlines()[0], examples)
    add_run_arguments(parser)
    add_scene_arguments(parser, limit=1000)
    run, data, route = parser.group(RUN), parser.group(DATA), parser.group(ROUTE)
    add_mesh_argument(parser)
    run.add_argument(
        "--found", nargs="+", type=Path, required=True, metavar="FILE", help="of evals.search, one a budget"
    )
    data.add_argument(
        "--questions", nargs="+", choices=tuple(QUESTIONS), default=list(QUESTIONS), help="(default: both)"
    )
    route.add_argument(
        "--equal",
        choices=tuple(SPENT),
        default="tokens",
        help="what a hand-set schedule must spend at least as much of: visual tokens, or multiply-accumulates of the "
        "prefill with scoring and merging (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
