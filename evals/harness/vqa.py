"""What the question-answering benchmarks share: one `Benchmark` each, and `main`, its command.

A new one is a short file with a BENCHMARK = Benchmark(...) and `main = partial(vqa.main, BENCHMARK)`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from evals.harness.cli import (
    add_data_arguments,
    benchmark_parser,
    exit_code_together,
    load_model,
    pad_colour,
    run_benchmark,
)
from evals.harness.columns import IMAGE, DataRow, Hub, open_table
from evals.harness.data import SCENES, Doc, DocSource, bad_row_named, row_docs
from evals.harness.metrics import Derived
from evals.harness.padding import Colour, padded
from evals.harness.processes import Processes
from evals.harness.routes import check_routes
from evals.harness.runner import Answerer, Record, Task
from reroute_jax.commandline.loading import load_options
from reroute_jax.commandline.parsing import DATA, Parser
from reroute_jax.errors import RerouteError
from reroute_jax.models import FAMILIES

STAND_IN_SPLIT = "test"
STAND_IN_LIMIT = 300
STAND_IN_MAX_NEW_TOKENS = 16  # the embedded models answer in one word


@dataclass(frozen=True)
class Benchmark:
    """A question-answering set with one image a row.

    name: of the task and of its module. about: one sentence for --help.
    hub: where the data are; None: the stand-in is all there is.
    columns: those that are read, the image's aside, and the type of their values; data without one are refused.
    prompt: row -> the text beside the image, without the chat template.
    score: (stripped answer, doc) -> fields of its JSON line. `doc.truth` is the row without its image. Among the
        fields, "metrics" maps names to finite numbers, possibly none; the reported number is their mean. "unparsed"
        says whether the benchmark's rules find nothing in the answer to score; of free answers, whether none is left.
    metrics: reported names, in the tables' order. A name that neither `derived` nor any question has is left out.
    stand_in: (scenes split, model family) -> rows of rendered scenes from the first on, with the hub's columns and
        `image` as a PIL image, without end.
    max_new_tokens: None where the reference leaves it to the model class.
    key: column of the question's id; None: the row's number.
    cluster: row -> label; rows that share one are drawn together for the intervals. None: the question's id.
    derived: reported name -> function of the means of the columns (in "metrics" of any question; those that start with
        "_" exist for this alone and are not reported). The means are arrays, one number a resample.
    finish: the records of a run in the order of the rows -> the same with "metrics" that need several rows filled in.
        A record with "left_out" (a reason such as "incomplete") is counted under it; give it empty metrics. Those
        whose image is bad come with it, and without the fields of `score`.
    difference_scale: 100 for metrics that are fractions, 1 for points: factor of the table of differences.
    """

    name: str
    about: str
    hub: Hub | None
    columns: Mapping[str, type]
    prompt: Callable[[DataRow], str]
    score: Callable[[str, Doc], Record]
    metrics: tuple[str, ...]
    stand_in: Callable[[str, str], Iterator[DataRow]]
    max_new_tokens: int | None
    key: str | None = "question_id"
    cluster: Callable[[DataRow], str] | None = None
    derived: Mapping[str, Derived] = field(default_factory=dict)
    finish: Callable[[Sequence[Record]], list[Record]] = list
    difference_scale: int = 100


def row_source(benchmark: Benchmark, data: str, split: str | None, family: str = "llava") -> DocSource:
    """The rows of `data`: the stand-in for `scenes`, drawn for a model family, or what `tables.open_table` takes.

    Raises RerouteError naming what is missing.
    """
    if data == SCENES:
        split = split or STAND_IN_SPLIT
        next(benchmark.stand_in(split, family))  # an unknown split is refused here, before a model is loaded
        return DocSource(f"{SCENES} [{split}]", lambda: benchmark.stand_in(split, family), None)
    table = open_table(data, split, benchmark.hub, tuple(benchmark.columns))
    if table.count == 0:
        raise RerouteError(f"{table.name} holds no question, expected at least one row")
    return DocSource(
        table.name,
        lambda: table.rows((*benchmark.columns, IMAGE)),
        table.count,
        table.files,
        lambda questions: islice(table.images(), questions),
        table.revision,
    )


def make_task(
    benchmark: Benchmark,
    source: DocSource,
    limit: int | None,
    max_new: int,
    skip_bad: bool = False,
    pad: Colour | None = None,
) -> Task:
    """The first `limit` questions of a source as a task; all of them without a limit. pad: colour of the squares that
    images are shown in."""
    total = min(count for count in (source.count, limit) if count is not None)

    def docs(start: int) -> Iterator[Doc]:
        how = benchmark.columns, benchmark.prompt, benchmark.key, benchmark.cluster
        found = row_docs(source, start, total, *how, skip_bad=skip_bad)
        for doc in found if pad is None else padded(found, pad):
            if not doc.bad:
                with bad_row_named(f"{source.name}, question {doc.question_id}"):
                    benchmark.score("", doc)  # a truth that nothing can be compared with is refused before it is asked
            yield doc

    return Task(
        name=benchmark.name,
        docs=docs,
        total=total,
        prompt=lambda doc: doc.text,
        score=benchmark.score,
        max_new_tokens=max_new,
        skip_bad=skip_bad,
        derived=benchmark.derived,
        finish=benchmark.finish,
        difference_scale=benchmark.difference_scale,
    )


def main(benchmark: Benchmark, argv: Sequence[str] | None = None) -> int:
    """Command line of a benchmark; returns the exit code."""
    args = parser(benchmark).parse_args(argv)
    return exit_code_together(lambda processes: _run(benchmark, args, processes), args)


def parser(benchmark: Benchmark) -> Parser:
    """Of the command of a benchmark."""
    parser = benchmark_parser(benchmark.name, benchmark.about)
    if benchmark.hub is not None:
        add_data_arguments(parser, benchmark.hub)
    else:
        parser.group(DATA).add_argument("--split", help=f"of the scenes (default: {STAND_IN_SPLIT})")
        parser.set_defaults(data=SCENES, skip_bad=False)
    return parser


def _run(benchmark: Benchmark, args: argparse.Namespace, processes: Processes | None) -> None:
    check_routes(args)
    source = row_source(benchmark, args.data, args.split)  # bad data is refused before a model is loaded
    model = load_model(args.model, args.dtype, args.mrope_compat, args.vicuna_system, **load_options(args))
    run_benchmark(args, model, source, *questions(benchmark, args, source, model), processes)


def questions(
    benchmark: Benchmark, args: argparse.Namespace, source: DocSource, model: Answerer
) -> tuple[Task, tuple[str, ...], dict[str, Any]]:
    """What `args` ask a model about a source that was opened: the task, its metrics, and its settings."""
    family, scenes = model.config.family, args.data == SCENES
    max_new = benchmark.max_new_tokens or FAMILIES[family].evaluation.max_new_tokens
    if scenes:
        source = row_source(benchmark, args.data, args.split, family)
        max_new = min(max_new, STAND_IN_MAX_NEW_TOKENS)
    limit = args.limit or (STAND_IN_LIMIT if scenes else None)
    task = make_task(benchmark, source, limit, args.max_new_tokens or max_new, args.skip_bad, pad_colour(args, model))
    return task, benchmark.metrics, {"data": source.name}
