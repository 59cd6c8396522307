"""Short answers about the embedded scenes: yes/no, colour, counting. `python -m evals.scenes_vqa --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from evals import prompts
from evals.cli import benchmark_parser, exit_code, load_model, run_benchmark
from evals.data import SCENES, Doc, vqa_docs
from evals.routes import check_routes
from evals.runner import Record, Task
from evals.scenes.data import vqa_rows
from evals.scenes.questions import VQA

NAME = "scenes_vqa"
MAX_NEW_TOKENS = 4  # an answer is one word
LIMIT = 300
METRICS = ("exact_match", *(f"exact_match_{kind}" for kind in VQA))


def score(text: str, doc: Doc) -> Record:
    """1 where the answer is the truth's word, whatever its case, overall and for the question's kind."""
    hit = float(text.lower() == doc.truth)
    return {"truth": doc.truth, "metrics": {"exact_match": hit, f"exact_match_{doc.category}": hit}}


def make_task(split: str, total: int, max_new: int, family: str = "llava") -> Task:
    """The first `total` questions of a split, about scenes drawn for a model family; the kinds take turns."""

    def docs(start: int):
        return vqa_docs(vqa_rows(split, total - start, VQA, start, family), f"{SCENES} [{split}]", start)

    return Task(NAME, docs, total, lambda doc: prompts.single_word(doc.text), score, max_new)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = benchmark_parser(NAME, "Questions about rendered scenes, with all visual tokens and with routed ones.")
    parser.add_argument("--split", default="test", help="default: %(default)s")
    args = parser.parse_args(argv)
    return exit_code(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    check_routes(args)
    next(vqa_rows(args.split, 1))  # an unknown split is refused before the model is loaded
    model = load_model(args.model, args.dtype, args.mrope_compat)
    task = make_task(args.split, args.limit or LIMIT, args.max_new_tokens or MAX_NEW_TOKENS, model.config.family)
    run_benchmark(args, model, task, METRICS, {"data": f"{SCENES} [{args.split}]"})


if __name__ == "__main__":
    sys.exit(main())
