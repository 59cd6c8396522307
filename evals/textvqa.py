"""TextVQA: reading text in photos, ten people's answers a question. `python -m evals.textvqa --help`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

from evals.harness import prompts, vqa
from evals.harness.columns import DataRow, Hub
from evals.harness.data import Doc
from evals.harness.runner import Record
from evals.harness.vqa_answers import agreement, clean
from evals.scenes.data import vqa_rows
from evals.scenes.world import COLOURS, SPLIT_LENGTH
from reroute_jax.errors import RerouteError


def prompt(row: DataRow) -> str:
    """The question with its first letter in upper case and, as in the reference, all others in lower case."""
    return prompts.single_word(row["question"].capitalize())


def score(text: str, doc: Doc) -> Record:
    """Agreement with the people's answers, both sides cleaned; a person's own answer does not count for them."""
    answers = doc.truth["answers"]
    if not any(answers):  # where they are kept secret they are ten empty ones
        raise RerouteError(f"question {doc.question_id} has no answers to compare with: choose a split that has them")
    parsed, truths = clean(text), [clean(answer) for answer in answers]
    others = [truths[:person] + truths[person + 1 :] for person in range(len(truths))]
    agreed = agreement(parsed, others)
    return {"parsed": parsed, "unparsed": not parsed, "truth": truths, "metrics": {"exact_match": agreed}}


def stand_in(split: str, family: str) -> Iterator[DataRow]:
    """Colours of objects in rendered scenes. Seven people say the word, two write it in upper case, one is wrong."""
    for index, row in enumerate(vqa_rows(split, SPLIT_LENGTH, ("colour",), family=family)):
        colour = row["answer"]
        wrong = COLOURS[(COLOURS.index(colour) + 1) % len(COLOURS)]
        yield {
            "image_id": row["question_id"],
            "question_id": index,
            "question": row["question"],
            "question_tokens": row["question"].lower().rstrip("?").split(),
            "image": row["image"],
            "image_width": row["image"].width,
            "image_height": row["image"].height,
            "flickr_original_url": "",
            "flickr_300k_url": "",
            "answers": [colour] * 7 + [colour.upper()] * 2 + [wrong],
            "image_classes": [],
            "set_name": split,
            "ocr_tokens": [],
        }


BENCHMARK = vqa.Benchmark(
    name="textvqa",
    about="Questions about text in photos.",
    hub=Hub("lmms-lab/textvqa", None, "validation"),
    columns={"question_id": object, "question": str, "answers": list},
    prompt=prompt,
    score=score,
    metrics=("exact_match",),
    stand_in=stand_in,
    max_new_tokens=None,
)
main = partial(vqa.main, BENCHMARK)

if __name__ == "__main__":
    sys.exit(main())
