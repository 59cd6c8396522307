"""VQAv2: open questions about photos, ten people's answers a question. `python -m evals.vqav2 --help`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

from evals.harness import prompts, vqa
from evals.harness.columns import DataRow, Hub
from evals.harness.data import Doc
from evals.harness.runner import Record
from evals.harness.vqa_answers import agreement, clean, normalise, one_line
from evals.scenes.data import vqa_rows
from evals.scenes.world import SPLIT_LENGTH
from reroute_jax.errors import RerouteError

ANSWER_TYPES = {"yesno": "yes/no", "colour": "other", "count": "number"}
OPENING_WORDS = {"yesno": 2, "colour": 4, "count": 2}  # of a question of each kind: its `question_type`
PEOPLE = 10


def prompt(row: DataRow) -> str:
    """The question as it is, with the instruction to be brief."""
    return prompts.single_word(row["question"])


def score(text: str, doc: Doc) -> Record:
    """Agreement with the people's answers; theirs are normalised only where they are not unanimous.

    Another person's answer is one whose dictionary differs, which its answer_id always brings about.
    """
    people = doc.truth["answers"]
    if not any(person["answer"] for person in people):
        raise RerouteError(f"question {doc.question_id} has no answers to compare with: choose a split that has them")
    if any(person in people[:place] for place, person in enumerate(people)):
        raise RerouteError(f"question {doc.question_id}: people cannot be told apart, expected an answer_id each")
    parsed, people = clean(text), [{**person, "answer": one_line(person["answer"])} for person in people]
    if len({person["answer"] for person in people}) > 1:
        parsed = normalise(parsed)
        people = [{**person, "answer": normalise(person["answer"])} for person in people]
    others = [[other["answer"] for other in people if other != person] for person in people]
    truths = [person["answer"] for person in people]
    agreed = agreement(parsed, others)
    return {"parsed": parsed, "unparsed": not parsed, "truth": truths, "metrics": {"exact_match": agreed}}


def stand_in(split: str, family: str) -> Iterator[DataRow]:
    """Yes/no, colours and counting in rendered scenes, on which all people agree."""
    for index, row in enumerate(vqa_rows(split, SPLIT_LENGTH, family=family)):
        kind, answer = row["category"], row["answer"]
        yield {
            "question_type": " ".join(row["question"].lower().split()[: OPENING_WORDS[kind]]),
            "multiple_choice_answer": answer,
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": person} for person in range(1, PEOPLE + 1)
            ],
            "image_id": index,
            "answer_type": ANSWER_TYPES[kind],
            "question_id": index,
            "question": row["question"],
            "image": row["image"],
        }


BENCHMARK = vqa.Benchmark(
    name="vqav2",
    about="Open questions about photos.",
    hub=Hub("lmms-lab/VQAv2", None, "validation"),
    columns={"question_id": object, "question": str, "answers": list},
    prompt=prompt,
    score=score,
    metrics=("exact_match",),
    stand_in=stand_in,
    max_new_tokens=16,
)
main = partial(vqa.main, BENCHMARK)

if __name__ == "__main__":
    sys.exit(main())
