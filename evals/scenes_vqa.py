"""Short answers about the embedded scenes: yes/no, colour, counting. `python -m evals.scenes_vqa --help`."""

import sys
from collections.abc import Iterator
from functools import partial

from evals.harness import prompts, vqa
from evals.harness.columns import DataRow
from evals.harness.data import Doc
from evals.harness.runner import Record
from evals.scenes.data import vqa_rows
from evals.scenes.questions import VQA
from evals.scenes.world import SPLIT_LENGTH


def prompt(row: DataRow) -> str:
    return prompts.single_word(row["question"])


def score(text: str, doc: Doc) -> Record:
    """1 where the answer is the truth's word, whatever its case, overall and for the question's kind."""
    truth, kind = doc.truth["answer"], doc.truth["category"]
    hit = float(text.lower() == truth)
    return {"truth": truth, "unparsed": not text, "metrics": {"exact_match": hit, f"exact_match_{kind}": hit}}


def rows(split: str, family: str) -> Iterator[DataRow]:
    """One question a scene; the kinds take turns."""
    return vqa_rows(split, SPLIT_LENGTH, family=family)


BENCHMARK = vqa.Benchmark(
    name="scenes_vqa",
    about="Questions about rendered scenes, with all visual tokens and with routed ones.",
    hub=None,
    columns={"question_id": str, "question": str, "answer": str, "category": str},
    prompt=prompt,
    score=score,
    metrics=("exact_match", *(f"exact_match_{kind}" for kind in VQA)),
    stand_in=rows,
    max_new_tokens=4,  # an answer is one word
)
main = partial(vqa.main, BENCHMARK)

if __name__ == "__main__":
    sys.exit(main())
