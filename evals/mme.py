"""MME: yes/no questions in pairs about one image, 14 categories in points. `python -m evals.mme --help`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
from PIL import Image

from evals.harness import prompts, vqa
from evals.harness.columns import DataRow, Hub
from evals.harness.data import Doc
from evals.harness.runner import INCOMPLETE, Record
from evals.scenes.questions import questions
from evals.scenes.render import render
from evals.scenes.world import COLOURS, SPLIT_LENGTH, family_scene, scene_seed, stream
from reroute_jax.errors import RerouteError

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
REQUEST = " Please answer yes or no."  # ends every question of the data set; the prompt has its own
YES, NO, OTHER = "yes", "no", "other"


def prompt(row: DataRow) -> str:
    """The question without the data set's own request for yes or no."""
    return prompts.single_word(row["question"].strip().replace(REQUEST, ""))


def parse(text: str) -> str:
    """yes, no or other: the whole answer without periods, or else whichever its first four characters hold."""
    answer = text.lower().strip().replace(".", "")
    if len(answer) == 1:
        return {"y": YES, "n": NO}.get(answer, OTHER)
    return next((word for word in (YES, NO) if word in answer[:4]), OTHER)


def score(text: str, doc: Doc) -> Record:
    """Right or wrong. The points come from pairs of questions: see `finish`."""
    category, truth = doc.truth["category"], doc.truth["answer"].lower().strip().replace(".", "")
    if category not in PERCEPTION + COGNITION:
        known = ", ".join(PERCEPTION + COGNITION)
        raise RerouteError(f"question {doc.question_id}: unknown category {category!r}, expected one of {known}")
    if truth not in (YES, NO):
        raise RerouteError(f"question {doc.question_id}: answer is {doc.truth['answer']!r}, expected Yes or No")
    parsed = parse(text)
    reading = {"parsed": parsed, "unparsed": parsed == OTHER}
    return {"category": category, **reading, "truth": truth, "correct": parsed == truth, "metrics": {}}


def finish(records: Sequence[Record]) -> list[Record]:
    """The points of each pair on its first row: 100 * the share that is right, and 100 more where both are.

    A row is left out as incomplete where its partner's image is bad, or where it is the last one, cut off from its
    partner by a limit. Raises RerouteError for any other question_id that does not come twice.
    """
    pairs: dict[str, list[int]] = {}
    for place, record in enumerate(records):
        pairs.setdefault(record["cluster"], []).append(place)
    finished = list(records)
    for pair, places in pairs.items():
        if len(places) != 2 and places != [len(records) - 1]:
            raise RerouteError(f"question_id {pair} has {len(places)} rows, expected a pair of them")
        good = [place for place in places if "left_out" not in records[place]]
        if len(good) == 2:
            right = sum(records[place]["correct"] for place in good)
            first = records[good[0]]
            points = {_column(first["category"]): 50.0 * right + 100.0 * (right == 2)}
            finished[good[0]] = first | {"metrics": points}
        elif good:
            finished[good[0]] = records[good[0]] | {"left_out": INCOMPLETE}
    return finished


def _column(category: str) -> str:
    return f"mme_{category}"


def _points(categories: Sequence[str], means: Mapping[str, np.ndarray]) -> np.ndarray:
    """Sum of the categories' means; one without questions adds nothing."""
    none = np.zeros_like(next(iter(means.values())))
    return sum((np.nan_to_num(means[name]) for name in map(_column, categories) if name in means), start=none)


def stand_in(split: str, family: str) -> Iterator[DataRow]:
    """A yes and a no about each rendered scene, in one wording: of existence, color or position, as MME names them."""
    for index in range(SPLIT_LENGTH):
        seed = scene_seed(split, index)
        scene = family_scene(seed, family)
        image = Image.fromarray(render(scene, seed))
        for question in questions(scene, stream(4, seed), {"yesno": 2}):
            category = _category(question.text)
            yield {
                "question_id": f"{category}/scene_{index}.png",
                "image": image,
                "question": question.text + REQUEST,
                "answer": question.answer.capitalize(),
                "category": category,
            }


def _category(question: str) -> str:
    if not question.startswith("Is there"):
        return "position"
    return "color" if any(colour in question for colour in COLOURS) else "existence"


BENCHMARK = vqa.Benchmark(
    name="mme",
    about="Yes/no questions in pairs: perception and cognition points.",
    hub=Hub("lmms-lab/MME", None, "test"),
    columns={"question_id": str, "question": str, "answer": str, "category": str},
    prompt=prompt,
    score=score,
    metrics=(
        "mme_perception_score",
        "mme_cognition_score",
        "mme_total",
        *map(_column, PERCEPTION + COGNITION),
    ),
    stand_in=stand_in,
    max_new_tokens=16,
    cluster=lambda row: f"{row['question_id']} of {row['category']}",
    derived={
        "mme_perception_score": partial(_points, PERCEPTION),
        "mme_cognition_score": partial(_points, COGNITION),
        "mme_total": partial(_points, PERCEPTION + COGNITION),
    },
    finish=finish,
    difference_scale=1,
)
main = partial(vqa.main, BENCHMARK)

if __name__ == "__main__":
    sys.exit(main())
