"""ScienceQA, questions with an image: school science by option letter. `python -m evals.scienceqa --help`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from string import ascii_uppercase

from evals.harness import prompts, vqa
from evals.harness.columns import DataRow, Hub
from evals.harness.data import Doc
from evals.harness.runner import Record
from evals.scenes.data import vqa_rows
from evals.scenes.world import COLOURS, SPLIT_LENGTH
from reroute_jax.errors import RerouteError


def prompt(row: DataRow) -> str:
    """Context where there is one, question, and the options with their letters."""
    context = "" if row["hint"] in ("", None) or _is_nan(row["hint"]) else f"Context: {row['hint']}\n"
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, row["choices"], strict=False))
    return prompts.option_letter(f"{context}{row['question']}\n{options}")


def score(text: str, doc: Doc) -> Record:
    """1 for the right letter alone, whatever its case, or for an answer that begins with it and a period."""
    index, choices = doc.truth["answer"], doc.truth["choices"]
    if any(choice is None or _is_nan(choice) for choice in choices):
        raise RerouteError(f"question {doc.question_id}: choices are {choices}, expected the text of each")
    if not 0 <= index < min(len(choices), len(ascii_uppercase)):
        raise RerouteError(f"question {doc.question_id}: answer is {index}, expected the place of one of {choices}")
    letter, letters = ascii_uppercase[index], ascii_uppercase[: len(choices)]
    hit, read = _says(text, letter), any(_says(text, one) for one in letters)
    return {"truth": letter, "unparsed": not read, "metrics": {"exact_match": float(hit)}}


def _is_nan(value: object) -> bool:
    """As tables have for a missing text."""
    return value != value


def _says(text: str, letter: str) -> bool:
    return text.lower() == letter.lower() or text.startswith(f"{letter}.")


def stand_in(split: str, family: str) -> Iterator[DataRow]:
    """Colours of objects in rendered scenes, by letter; every other question has a context."""
    for index, row in enumerate(vqa_rows(split, SPLIT_LENGTH, ("colour",), family=family)):
        turn = index % len(COLOURS)
        choices = [*COLOURS[turn:], *COLOURS[:turn]]
        yield {
            "image": row["image"],
            "question": row["question"],
            "choices": choices,
            "answer": choices.index(row["answer"]),
            "hint": "The picture shows a few objects." if index % 2 else "",
            "task": "closed choice",
            "grade": "grade1",
            "subject": "natural science",
            "topic": "physics",
            "category": "Colors",
            "skill": "Name the color of an object",
            "lecture": "",
            "solution": "",
        }


BENCHMARK = vqa.Benchmark(
    name="scienceqa",
    about="School science questions with an image, by option letter.",
    hub=Hub("lmms-lab/ScienceQA", "ScienceQA-IMG", "test"),
    columns={"question": str, "choices": list, "answer": int, "hint": object},  # a hint may be missing
    prompt=prompt,
    score=score,
    metrics=("exact_match",),
    stand_in=stand_in,
    max_new_tokens=16,
    key=None,
)
main = partial(vqa.main, BENCHMARK)

if __name__ == "__main__":
    sys.exit(main())
