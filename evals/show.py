"""Pictures of which visual tokens ran, in one page. `python -m evals.show --help`.

Asks a few questions of a benchmark, or takes those of a run folder, and runs each prompt once more for its trace.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from evals.harness.boxes import NULL_BOX, Box, normalise_box, shrunk
from evals.harness.cli import load_model
from evals.harness.data import Doc
from evals.harness.finished_runs import Finished, read_finished
from evals.harness.pages import RIGHT, UNKNOWN, WRONG, Board, PageQuestion, Point, board, is_right, page, shown_truth
from evals.harness.routes import FULL, check_routes, plan_routes
from evals.harness.runner import Record, Run, Task, as_seen
from evals.table import WITH_SCENES
from reroute_jax.commandline.loading import load_options
from reroute_jax.commandline.parsing import DATA, RUN, Parser, exit_code
from reroute_jax.engine.compilation import keep_programs
from reroute_jax.engine.model import Model
from reroute_jax.engine.trace import Trace
from reroute_jax.errors import RerouteError
from reroute_jax.figure.card import ShownAnswer, ShownQuestion
from reroute_jax.routing.plan import Schedule

SHOWN = 8  # questions, where nothing else is said
# Arguments of the tasks' own commands that nothing here uses.
UNUSED = {"batch_size": "asks one question at a time", "fresh": "keeps no answers"}
OWN = ("task", "run", "index", "limit", "out", "compilation_cache", "debug")
SETTINGS = (
    "prompt_style",
    "coord_format",
    "jpeg_roundtrips",
    "llava_image_mode",
    "vicuna_system",
    "mrope_compat",
    "quantise",
    "kv_cache",
)
FRAME_NOTE = (
    "Boxes are drawn where the model points in the image that it sees; verdicts and IoU are those of the score."
)
CROP_NOTE = "The model sees the part of the image that is shown; the rest was cut off."


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    task = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    task.add_argument("--task", default="refcoco")
    name = task.parse_known_args(argv)[0].task
    parser = _parser(name if name in WITH_SCENES else "refcoco")
    args = parser.parse_args(argv)
    return exit_code(lambda: _run(args, parser), args.debug, "stopped: no page was written")


def _parser(task: str) -> Parser:
    """All arguments of the task's own command, and those of the page."""
    parser = WITH_SCENES[task].parser()
    parser.prog = "python -m evals.show"
    parser.description = "Pictures of which visual tokens ran in each stage, as one self-contained page."
    examples = "", "--compare --method pdrop --budget 64 --index 3,7", "--run runs/refcoco/MY_RUN --limit 20"
    parser.epilog = "\n".join(["examples:", *(f"  {parser.prog} {example}".rstrip() for example in examples)])
    parser.group(RUN).add_argument(
        "--task", choices=tuple(WITH_SCENES), default="refcoco", help="whose questions (default: %(default)s)"
    )
    parser.group(DATA).add_argument(
        "--run", type=Path, metavar="FOLDER", help="of any evals command: show its questions, and take all else from it"
    )
    parser.group(DATA).add_argument("--index", type=_indices, metavar="3,7", help="numbers of the questions to show")
    parser.set_defaults(out=Path("runs/show"))
    meanings = {
        "limit": f"how many questions, with --run those that tell most (default: {SHOWN})",
        "out": "folder of the page (default: %(default)s)",
    }
    parser.set_defaults(**dict.fromkeys(UNUSED))
    for action in parser._actions:
        action.help = argparse.SUPPRESS if action.dest in UNUSED else meanings.get(action.dest, action.help)
    return parser


def _indices(text: str) -> tuple[int, ...]:
    """argparse type: numbers between commas."""
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 3,7")
    return tuple(dict.fromkeys(map(int, text.split(","))))


def _run(args: argparse.Namespace, parser: Parser) -> None:
    for name, why in UNUSED.items():
        if getattr(args, name) is not None:
            raise RerouteError(f"evals.show {why}: leave out --{name.replace('_', '-')}")
    if args.index is not None and args.limit is not None:
        raise RerouteError("--index names the questions and --limit counts them: give one of them")
    if args.compilation_cache is not None:
        keep_programs(args.compilation_cache)
    if args.run is None:
        title, boards = f"{args.task}: which visual tokens ran", [_asked_board(args)]
    else:
        own = {name: value for name, value in vars(args).items() if name not in OWN}
        said = [name for name, value in own.items() if value != parser.get_default(name)]
        if said:
            raise RerouteError(f"--run takes everything from the folder, leave out --{said[0].replace('_', '-')}")
        title, boards = f"{args.run.name}: which visual tokens ran", [_finished_board(args)]
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "index.html"
    file.write_text(page(title, boards), encoding="utf-8", errors="backslashreplace")
    print(f"{len(boards[0].cards)} questions: {file}")


def _asked_board(args: argparse.Namespace) -> Board:
    """Ask the chosen questions now."""
    if args.distributed:
        raise RerouteError("a page of a few questions is made by one process: leave out --distributed")
    check_routes(args)
    command, limit, args.limit = WITH_SCENES[args.task], args.limit or SHOWN, None
    source = command.source(args)
    model = load_model(args.model, args.dtype, args.mrope_compat, args.vicuna_system, **load_options(args))
    task, _, settings = command.questions(args, source, model)
    routes = plan_routes(args, model)
    chosen = args.index or range(min(limit, task.total))
    cards, asked, records = {}, [], []
    for doc in _progress(_docs(task, chosen), len(chosen)):
        if doc.bad:
            raise RerouteError(f"question {doc.doc_id} has no image that can be shown ({doc.bad})")
        row = {run.name: _answer(model, task, run, doc) for run in routes.runs}
        card = _question(model, doc, task.prompt(doc), routes.runs, row, command.metric, settings)
        verdicts = "".join(_verdict(record, command.metric) for record in row.values())
        answers = tuple(record["text"] for record in row.values())
        asked.append(PageQuestion(doc.doc_id, doc.text, card.truth, answers, verdicts))
        cards[doc.doc_id] = card
        records.append(row)
    points = tuple(
        _point(
            run, [row[run.name] for row in records], command.metric, [card.answers[place] for card in cards.values()]
        )
        for place, run in enumerate(routes.runs)
    )
    runs = tuple(run.name for run in routes.runs)
    pairs = routes.contrasts or tuple((run, runs[0]) for run in runs[1:])
    note = f"{len(asked)} questions of {settings['data']}: too few for a score, run evals.{args.task} for one."
    return Board(f"{args.task}, {args.model}", "% right", points, runs, pairs, tuple(asked), cards, note)


def _point(run: Run, records: Sequence[Record], metric: str, answers: Sequence[ShownAnswer]) -> Point:
    known = [right for record in records if (right := is_right(record, metric)) is not None]
    share = sum(100 * one.routed.average / one.routed.visual for one in answers) / len(answers)
    kv_bytes = sum(one.routed.kv_bytes for one in answers) / len(answers)
    score = 100 * sum(known) / len(known) if known else 0.0
    return Point(run.name, run.schedule.label.rsplit(" ", 1)[0], share, score, "", kv_bytes)


def _verdict(record: Record, metric: str) -> str:
    return {True: RIGHT, False: WRONG, None: UNKNOWN}[is_right(record, metric)]


def _finished_board(args: argparse.Namespace) -> Board:
    """Take questions and answers from a run folder, the most telling ones first, and add their traces."""
    finished = read_finished(args.run)
    settings = finished.settings
    name = settings["task"]
    if name not in WITH_SCENES:
        raise RerouteError(f"{args.run} is of the task {name!r}: expected one of {', '.join(WITH_SCENES)}")
    command = WITH_SCENES[name]
    own = _own_arguments(name, settings)
    source = command.source(own)
    model = load_model(own.model, own.dtype, own.mrope_compat, own.vicuna_system, **load_options(own))
    task, _, _ = command.questions(own, source, model)
    runs = [Run(run, Schedule.from_record(record)) for run, record in settings["runs"].items()]
    plain = board(finished, command.metric, task.difference_scale, {})
    chosen = args.index or _telling(plain, args.limit or SHOWN)
    cards = {}
    for doc in _progress(_docs(task, chosen), len(chosen)):
        row = {run.name: finished.records[run.name][doc.doc_id] for run in runs}
        _check_same(finished, task, doc, row)
        cards[doc.doc_id] = _question(model, doc, row[runs[0].name]["prompt"], runs, row, command.metric, settings)
    return board(finished, command.metric, task.difference_scale, cards)


def _telling(plain: Board, limit: int) -> list[int]:
    """Numbers of the questions that the page lists first."""
    usable = [asked for asked in plain.ordered() if any(asked.answers)]
    return sorted(asked.number for asked in usable[:limit])


def _own_arguments(task: str, settings: Mapping[str, Any]) -> argparse.Namespace:
    """Those of the task's own command that made a folder."""
    own = WITH_SCENES[task].parser().parse_args([])
    data = re.fullmatch(r"(.+) \[([^\]]+)\]", settings["data"])
    own.data, own.split = data.groups() if data else (settings["data"], None)
    own.model, own.dtype, own.seed = settings["model"], settings["dtype"], settings["seed"]
    own.limit, own.max_new_tokens = settings["questions"], settings["max_new_tokens"]
    for name in SETTINGS:
        if name in settings:
            setattr(own, name, settings[name])
    return own


def _check_same(finished: Finished, task: Task, doc: Doc, row: Mapping[str, Record]) -> None:
    record = next(iter(row.values()))
    if "prompt" not in record:
        raise RerouteError(f"question {doc.doc_id} of {finished.folder} was left out ({record.get('left_out')})")
    if task.prompt(doc) != record["prompt"] or list(doc.size) != record["image_size"]:
        raise RerouteError(
            f"question {doc.doc_id} of {finished.folder} is not that of {finished.settings['data']} any more: "
            "repeat the run"
        )


def _docs(task: Task, chosen: Sequence[int]) -> Iterator[Doc]:
    for number in chosen:
        if number >= task.total:
            raise RerouteError(f"there is no question {number}: {task.name} has {task.total}, from 0 on")
        yield next(islice(task.docs(number), 1))


def _progress(docs: Iterator[Doc], count: int) -> Iterator[Doc]:
    return tqdm(docs, total=count, desc="pictures", unit="question")


def _answer(model: Model, task: Task, run: Run, doc: Doc) -> Record:
    how = {"schedule": run.schedule, "max_new_tokens": task.max_new_tokens}
    text = model.generate([(doc.image, task.prompt(doc))], **how)[0]
    seen = as_seen(doc, run.schedule, model.visual_grid(doc.image))
    return {"text": text, **task.score(text.strip(), seen)}


def _question(
    model: Model,
    doc: Doc,
    prompt: str,
    runs: Sequence[Run],
    row: Mapping[str, Record],
    metric: str,
    settings: Mapping[str, Any],
) -> ShownQuestion:
    """The card of one question. row: its record by run."""
    traces = {run.name: _trace(model, doc, prompt, run) for run in runs}
    seen = model.family.seen_part(doc.image.size, model.image_processor)
    grounded = "parsed" in row[runs[0].name] and "box" in row[runs[0].name]
    answers = tuple(
        ShownAnswer(
            "all tokens" if run.name == FULL else run.name,
            (record := row[run.name])["text"].strip(),
            is_right(record, metric),
            f"IoU {record['metrics']['refcoco_IoU']:.2f}" if grounded else "",
            _predicted(record, settings["coord_format"], _frame(model, run, doc)) if grounded else None,
            traces[run.name].routed(),
        )
        for run in runs
    )
    truth = row[runs[0].name].get("truth", "")
    notes = [CROP_NOTE] * (seen != (0.0, 0.0, 1.0, 1.0)) + [FRAME_NOTE] * grounded
    return ShownQuestion(
        title=f"question {doc.doc_id} ({doc.question_id})",
        text=doc.text,
        truth=shown_truth(truth),
        truth_box=_true_box(truth, doc, seen) if grounded else None,
        views=tuple(traces[runs[0].name].seen.views(0)),
        answers=answers,
        notes=tuple(notes),
    )


def _trace(model: Model, doc: Doc, prompt: str, run: Run) -> Trace:
    return model.answer([(doc.image, prompt)], schedule=run.schedule, max_new_tokens=1, trace=True)[0].trace


def _frame(model: Model, run: Run, doc: Doc) -> tuple[float, float]:
    """(width, height) in pixels of what a run's tower sees."""
    return shrunk(model.model_size(doc.image), as_seen(doc, run.schedule, model.visual_grid(doc.image)).shrinking)


def _predicted(record: Record, coord_format: str, view: tuple[float, float]) -> Box | None:
    """In fractions of the image that the model sees, which is what its answer means."""
    parsed = tuple(record["parsed"])
    return None if parsed == NULL_BOX else normalise_box(parsed, coord_format, view)


def _true_box(truth: Sequence[float], doc: Doc, seen: Box) -> Box:
    """From fractions of the stored image, over those of the image that was given, to those of its part that is seen."""
    placed = []
    for axis in (0, 1):
        stored, given = doc.size[axis], doc.image.size[axis]
        margin = (given - stored) // 2  # around an image that was padded to a square
        first, last = seen[axis], seen[axis + 2]
        placed.append([((truth[end] * stored + margin) / given - first) / (last - first) for end in (axis, axis + 2)])
    (x1, x2), (y1, y2) = placed
    return x1, y1, x2, y2


if __name__ == "__main__":
    sys.exit(main())
