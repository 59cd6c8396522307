"""The matrix of models, methods, actions, budgets and tasks as one table and a figure. `python -m evals.table --help`.

Every run has a folder OUT/MODEL/TASK/RUN of its own, so that a matrix can be stopped, repeated and widened: what is
there is not asked again. All runs of a model on a task share its answers with all tokens.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import jax

from convert.embedded import CAVEATS, EMBEDDED, locate
from convert.source import open_source
from evals import gqa, mmbench, mme, pope, refcoco, refcocog, refcocoplus, scenes_vqa, scienceqa, textvqa, vqav2
from evals.harness import vqa
from evals.harness.cli import (
    add_compat_argument,
    add_fresh_argument,
    exit_code_of,
    load_model,
    run_settings,
    write_summary,
)
from evals.harness.columns import OWN_HUB, Hub
from evals.harness.data import REFCOCO, SCENES, DocSource, rec_source
from evals.harness.finished_runs import read_finished
from evals.harness.matrix import Entry, Outcome, Sheet, draw, markdown, write_csv
from evals.harness.pages import board, page
from evals.harness.pixels import with_harness_pixels
from evals.harness.report import score_runs, summarise
from evals.harness.routes import FULL, Routes, named_run
from evals.harness.run_folder import locked, run_folder
from evals.harness.runner import Answerer, Run, Task, answer
from reroute_jax.commandline.loading import LOAD_OPTIONS, add_bits_arguments, add_mesh_argument, load_options
from reroute_jax.commandline.parsing import DATA, OUTPUT, ROUTE, RUN, Parser, budget, positive, whole
from reroute_jax.config import ModelConfig
from reroute_jax.errors import RerouteError
from reroute_jax.models import FAMILIES, read_config
from reroute_jax.routing.methods import METHODS, plan
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.presets import PRESETS, preset, preset_name
from reroute_jax.routing.stages import ACTIONS
from reroute_jax.routing.switches import SWITCHES
from reroute_jax.types import FLOATS

GROUNDING, ANSWERING = "grounding", "answering"
# The deletions that the released configurations compare with.
DELETIONS = {"fastv": "fastv_K3", "pdrop": "pdrop_earlyL2"}
MATRIX = {
    "methods": ("fastv", "pdrop", "nuwa"),
    "actions": ("delete", "reroute"),
    "budgets": (192, 128, 64),
}  # where not given
OFFICIAL_NOTE = (
    "The stage-wise configurations are the computation of their namesakes and share their answers. The released avg64 "
    "rows of PDrop's schedules average more than 64 tokens of 576: compare at the realised share."
)
SCALED_NOTE = (
    "None of these configurations was released for this family: they are ours, the released layers scaled to the depth "
    "of the model, with the released ratios."
)
PLOT_HINT = "the figure needs matplotlib: pip install 'reroute_jax[plot]'"


@dataclass(frozen=True)
class Command:
    """A benchmark in the table. metric: its headline. kind: of the average that it counts for.

    parser: of its own command. source: opens the data that the arguments name. questions: (arguments, source, model)
    -> the task, its metrics and settings.
    """

    metric: str
    kind: str
    parser: Callable[[], argparse.ArgumentParser]
    source: Callable[[argparse.Namespace], DocSource]
    questions: Callable[[argparse.Namespace, DocSource, Answerer], tuple[Task, Sequence[str], Mapping[str, Any]]]


def _grounding(name: str, hub: Hub) -> Command:
    return Command(
        "refcoco_ACC@0.5",
        GROUNDING,
        partial(refcoco.parser, name, hub),
        lambda args: rec_source(args.data, args.split, hub=hub),
        partial(refcoco.questions, name=name),
    )


def answering(benchmark: vqa.Benchmark, metric: str) -> Command:
    """Of a question-answering set."""
    return Command(
        metric,
        ANSWERING,
        partial(vqa.parser, benchmark),
        lambda args: vqa.row_source(benchmark, args.data, args.split),
        partial(vqa.questions, benchmark),
    )


COMMANDS = {
    "refcoco": _grounding("refcoco", REFCOCO),
    "refcocoplus": _grounding("refcocoplus", refcocoplus.HUB),
    "refcocog": _grounding("refcocog", refcocog.HUB),
    "pope": answering(pope.BENCHMARK, "pope_accuracy"),
    "gqa": answering(gqa.BENCHMARK, "exact_match"),
    "mme": answering(mme.BENCHMARK, "mme_total"),
    "mmbench": answering(mmbench.BENCHMARK, "gpt_eval_score"),
    "textvqa": answering(textvqa.BENCHMARK, "exact_match"),
    "scienceqa": answering(scienceqa.BENCHMARK, "exact_match"),
    "vqav2": answering(vqav2.BENCHMARK, "exact_match"),
}
# With the embedded models' own questions, which are in no paper's table.
WITH_SCENES = COMMANDS | {"scenes_vqa": answering(scenes_vqa.BENCHMARK, "exact_match")}
# The splits of the paper's grounding average.
EIGHT_SPLITS = (
    *(f"{name}:{split}" for name, split in product(("refcoco", "refcocoplus"), ("val", "testA", "testB"))),
    *(f"refcocog:{split}" for split in ("val", "test")),
)


@dataclass(frozen=True)
class OpenedTask:
    """A task of the matrix with its data opened. name: as the user gave it. args: those of its own command."""

    name: str
    command: Command
    args: argparse.Namespace
    source: DocSource


@dataclass(frozen=True)
class Planned:
    """What a model is to run: rows, and the runs whose answers fill them, the one with all tokens first."""

    entries: tuple[Entry, ...]
    routes: Routes


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = _parser().parse_args(argv)
    return exit_code_of(lambda: _run(args), args)


def _parser() -> Parser:
    examples = (
        "--methods pdrop,nuwa --budgets 64 --limit 100",
        "--tasks refcoco:testA,pope --models scenes-llava,scenes-qwen",
        "--official --models llava-hf/llava-1.5-7b-hf --tasks grounding --data hub",
    )
    parser = Parser("evals.table", "One table and a figure of many runs.", examples)
    run, data, route = parser.group(RUN), parser.group(DATA), parser.group(ROUTE)
    _add_list(run, "models", str, f"hub ids, folders, or embedded ones: {', '.join(EMBEDDED)}", EMBEDDED[:1])
    tasks = f"of {', '.join(COMMANDS)}, each with a split as in refcoco:testA where it is not the default one"
    _add_list(run, "tasks", str, f"{tasks}; '{GROUNDING}': the paper's eight grounding splits", ("refcoco",))
    run.add_argument("--dtype", choices=tuple(FLOATS), help="as of the other commands")
    add_mesh_argument(parser)
    add_bits_arguments(parser)
    run.add_argument("--batch-size", type=positive, default=8, help="questions at a time (default: %(default)s)")
    run.add_argument(
        "--seed", type=whole, default=0, help="of the method `random` and of the intervals (default: %(default)s)"
    )
    data.add_argument(
        "--data",
        default=SCENES,
        help=f"'{SCENES}': rendered stand-ins; '{OWN_HUB}': each task's own set on the hub; or a folder that holds a "
        "folder of each task's name in the hub's layout (default: %(default)s)",
    )
    data.add_argument("--limit", type=positive, help="only the first so many questions of each task")
    data.add_argument(
        "--skip-bad", action="store_true", help="count and report images that cannot be decoded instead of stopping"
    )
    _add_list(route, "methods", _one_of(METHODS), f"of {', '.join(name for name in METHODS if name != 'none')}")
    _add_list(route, "actions", _one_of(ACTIONS), f"of {', '.join(ACTIONS)}")
    _add_list(route, "budgets", budget, "192, 128, 64, or shares")
    route.add_argument(
        "--official",
        action="store_true",
        help="the released configurations of each model's family instead of methods, actions and budgets",
    )
    add_compat_argument(parser)
    parser.group(OUTPUT).add_argument(
        "--out", type=Path, default=Path("runs/table"), help="folder (default: %(default)s)"
    )
    add_fresh_argument(parser)
    return parser


def _add_list(group, name: str, of: Callable[[str], Any], about: str, default: Sequence[Any] | None = None) -> None:
    """An argument of values between commas. Without a default it is None unless given, and `MATRIX` has its values."""
    about = f"{about} (default: {','.join(map(str, default or MATRIX[name]))})"
    group.add_argument(f"--{name}", type=partial(listed, of), default=default, metavar="A,B", help=about)


def listed(of: Callable[[str], Any], text: str) -> tuple[Any, ...]:
    """argparse type: values between commas, each once."""
    values = tuple(of(part) for part in text.split(","))
    if len(set(values)) != len(values):
        raise argparse.ArgumentTypeError(f"{text!r} names one of its parts twice")
    return values


def _one_of(allowed: Sequence[str]) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in allowed:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(allowed)}")
        return text

    return check


def _run(args: argparse.Namespace) -> None:
    """Everything that can be refused is looked at before the first model is loaded."""
    if find_spec("matplotlib") is None:
        raise RerouteError(PLOT_HINT)
    given = [f"--{name}" for name in MATRIX if getattr(args, name) is not None]
    if args.official and given:
        raise RerouteError(f"--official fixes the whole schedules, leave out {', '.join(given)}")
    if "none" in (args.methods or ()):
        raise RerouteError("method 'none' is the run with all tokens, which is always there: leave it out of --methods")
    planned = {model: _planned(model, args) for model in args.models}
    asked = [opened_task(name, args) for name in _task_names(args.tasks)]
    with locked(args.out):
        sheets = [_sheet(model, planned[model], asked, args) for model in args.models]
        text = markdown(sheets)
        (args.out / "table.md").write_text(text, encoding="utf-8", errors="backslashreplace")
        write_csv(sheets, args.out / "table.csv")
        draw(sheets, [args.out / "figure.png", args.out / "figure.svg"])
        (args.out / "index.html").write_text(_page(sheets, args.out), encoding="utf-8", errors="backslashreplace")
    print(f"{text}\nindex.html, table.md, table.csv, figure.png, figure.svg, answers and summaries: {args.out}")


def _page(sheets: Sequence[Sheet], out: Path) -> str:
    """Every model on every task as `evals.show` has it, without pictures of tokens."""
    boards = []
    for sheet in sheets:
        for one in sheet.outcomes:
            folder = _task_folder_of(out, sheet.model, one.task)
            note = f"Pictures of which tokens ran: python -m evals.show --run {folder}"
            boards.append(board(read_finished(folder), one.metric, one.scale, {}, note))
    return page("Accuracy against visual tokens", boards)


def _task_names(given: Sequence[str]) -> list[str]:
    names = [name for one in given for name in (EIGHT_SPLITS if one == GROUNDING else (one,))]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise RerouteError(f"--tasks names {twice[0]} twice")
    return names


def opened_task(name: str, args: argparse.Namespace) -> OpenedTask:
    """Raises RerouteError for an unknown task or split, and for data that are not there."""
    task, _, split = name.partition(":")
    if task not in COMMANDS:
        raise RerouteError(f"unknown task {task!r}: expected some of {', '.join(COMMANDS)}, or {GROUNDING}")
    command = COMMANDS[task]
    own = command.parser().parse_args([])
    own.data = args.data if args.data in (SCENES, OWN_HUB) else _task_folder(args.data, task)
    own.split = split or None
    for shared in ("dtype", "mrope_compat", "batch_size", "limit", "seed", "skip_bad", *LOAD_OPTIONS):
        setattr(own, shared, getattr(args, shared))
    return OpenedTask(name, command, own, command.source(own))


def _task_folder(data: str, task: str) -> str:
    """Checked here: a relative path that does not exist reads like a hub id."""
    folder = Path(data).expanduser() / task
    if not folder.is_dir():
        raise RerouteError(f"no folder {folder}: --data is '{SCENES}', '{OWN_HUB}', or a folder with one for each task")
    return str(folder)


def _planned(model: str, args: argparse.Namespace) -> Planned:
    """Rows and runs of a model, from its configuration alone. Raises RerouteError naming a run that does not fit it."""
    source = open_source(locate(model))
    config = read_config(source.config, source.generation)
    family = FAMILIES[config.family]
    config = with_harness_pixels(config, lambda: family.image_processor(source.folder, config))
    rows, cols = family.typical_grid(config, lambda: family.image_processor(source.folder, config))
    sizes = {"num_layers": config.num_layers, "visual": rows * cols, "grid": (rows, cols), "family": config.family}
    full = Run(FULL, plan("none", **sizes))
    try:
        if args.official:
            return _official(config, full)
        return _matrix(partial(plan, **sizes), full, args)
    except RerouteError as error:
        raise RerouteError(f"{model}: {error}") from error


def _matrix(planner: Callable[..., Schedule], full: Run, args: argparse.Namespace) -> Planned:
    """The product of budgets, methods and actions; a method without actions comes once a budget."""
    methods, actions, budgets = (getattr(args, name) or MATRIX[name] for name in MATRIX)
    entries, runs = [Entry(FULL, FULL)], [full]
    for share, name in product(budgets, methods):
        method = METHODS[name]
        names: dict[str, str] = {}
        for action in actions if method.has_actions else ("reroute",):
            seed = {"seed": args.seed} if name in SWITCHES["seed"].methods else {}
            run = named_run(planner(name, budget=share, action=action, **seed))
            names[action] = run.name
            runs.append(run)
        for action, run_name in names.items():
            against = names.get("delete") if action == "reroute" else None
            shown = action if method.has_actions else ""
            entries.append(Entry(run_name, run_name, name, shown, str(share), against))
    return Planned(tuple(entries), _routes(entries, runs))


def _official(config: ModelConfig, full: Run) -> Planned:
    """The released configurations of the model's family. Those that differ in their label alone share one run."""
    own = FAMILIES[config.family]
    if own.released is None:
        raise RerouteError(f"there are no released configurations for {config.family}: leave out --official")
    runs: dict[Schedule, Run] = {}
    entries = []
    for name, (family, variant, tier) in PRESETS.items():
        if family != own.name:
            continue
        schedule = preset(name, config.num_layers)
        if variant is None:
            entries.append(Entry(name, FULL))
            continue
        run = runs.setdefault(replace(schedule, label=""), named_run(schedule))
        host = next(host for host in DELETIONS if host in variant)
        deletes = variant in DELETIONS.values()
        against = None if deletes else preset_name(own, DELETIONS[host], tier)
        entries.append(Entry(name, run.name, host, "delete" if deletes else "reroute", str(tier), against))
    return Planned(tuple(entries), _routes(entries, [full, *runs.values()]))


def _routes(entries: Sequence[Entry], runs: Sequence[Run]) -> Routes:
    contrasts = dict.fromkeys((entry.run, entry.against) for entry in entries if entry.against is not None)
    return Routes(tuple(runs), tuple(contrasts))


def _sheet(name: str, planned: Planned, asked: Sequence[OpenedTask], args: argparse.Namespace) -> Sheet:
    """All answers of a model, which is in memory no longer than this."""
    model = load_model(name, args.dtype, args.mrope_compat, **load_options(args))
    outcomes = []
    for number, one in enumerate(asked, 1):
        print(f"{name}, {one.name} ({number} of {len(asked)} tasks), {len(planned.routes.runs)} runs", flush=True)
        outcomes.append(outcome(name, model, planned.routes, one, args))
    jax.clear_caches()  # the programs of a model that is done
    notes = [OFFICIAL_NOTE] * args.official
    if args.official and FAMILIES[model.config.family].released.depth is None:
        notes.append(SCALED_NOTE)
    notes += [f"Answered with {option} {value}." for option, value in load_options(args).items()]
    notes += [f"Note: {CAVEATS[name]}."] if name in CAVEATS else []
    notes += [
        f"{one.task}: {len(found)} questions left out, {reason}."
        for one in outcomes
        for reason, found in one.summary.get("left_out", {}).items()
    ]
    notes += [
        f"{one.task}: {len(found)} questions noted, {reason}."
        for one in outcomes
        for reason, found in one.summary.get("noted", {}).items()
    ]
    notes += [f"Warning: {one.task}, {line}." for one in outcomes for line in one.summary.get("warnings", ())]
    return Sheet(name, planned.entries, tuple(outcomes), tuple(notes))


def outcome(name: str, model: Answerer, routes: Routes, asked: OpenedTask, args: argparse.Namespace) -> Outcome:
    own = argparse.Namespace(**{**vars(asked.args), "model": name})
    task, metrics, settings = asked.command.questions(own, asked.source, model)
    settings = run_settings(own, model, asked.source, task, settings)
    folder = _task_folder_of(args.out, name, asked.name)
    with ExitStack() as held:
        for run in routes.runs:  # all of them are looked at before the first is asked
            own_settings = settings | {"runs": Routes((run,), ()).settings}
            held.enter_context(run_folder(folder / run.name, own_settings, args.fresh))
        records = answer(model, task, [(run, folder / run.name) for run in routes.runs], args.batch_size)
    summary = summarise(records, routes, metrics, model, args.seed, task)
    write_summary(folder, summary, settings | {"runs": routes.settings})
    return Outcome(
        asked.name,
        asked.command.kind,
        asked.command.metric,
        task.difference_scale,
        summary,
        score_runs(records, metrics, args.seed, task),
    )


def _task_folder_of(out: Path, model: str, task: str) -> Path:
    """Of the answers of a model to a task."""
    return out / _file_name(model) / _file_name(task)


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-")


if __name__ == "__main__":
    sys.exit(main())
