"""POPE: is an object there? `python -m evals.pope --help`.

Follows lmms-eval v0.7.1: the only answers are `yes` and `no`, and `Yes.` is wrong.
"""

import sys
from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np

from evals.harness import prompts, vqa
from evals.harness.columns import DataRow, Hub
from evals.harness.data import Doc, identifier
from evals.harness.metrics import ratio
from evals.harness.runner import Record
from evals.scenes.data import vqa_rows
from evals.scenes.world import SPLIT_LENGTH
from reroute_jax.errors import RerouteError

NAME = "pope"
HUB = Hub("lmms-lab/POPE", "default", "test")
COLUMNS = {"id": object, "question": str, "answer": str, "image_source": object}
STAND_IN_CATEGORIES = ("adversarial", "popular", "random")  # take turns; the scenes know no such difference
METRICS = (
    "pope_accuracy",
    "pope_precision",
    "pope_recall",
    "pope_f1_score",
    "pope_yes_ratio",
    "pred_yes_ratio",  # ours: the reference's ratio is that of the labels
)
MAX_NEW_TOKENS = 128
ANSWERS = ("yes", "no")


def prompt(row: DataRow) -> str:
    return prompts.single_word(row["question"].strip())


def pope_outcome(text: str, answer: str) -> dict[str, float]:
    """The columns of one answer. Neither a positive nor a negative is what is neither `yes` nor `no`."""
    said, truth = text.lower().strip(), answer.lower().strip()
    return {
        "pope_accuracy": float(said == truth),
        "pope_yes_ratio": float(truth == "yes"),
        "pred_yes_ratio": float(said.startswith("yes")),
        "_true_yes": float(said == truth == "yes"),
        "_false_yes": float(said == "yes" and truth == "no"),
        "_false_no": float(said == "no" and truth == "yes"),
    }


def precision(means: Mapping[str, np.ndarray]) -> np.ndarray:
    return ratio(means["_true_yes"], means["_true_yes"] + means["_false_yes"])


def recall(means: Mapping[str, np.ndarray]) -> np.ndarray:
    return ratio(means["_true_yes"], means["_true_yes"] + means["_false_no"])


def f1_score(means: Mapping[str, np.ndarray]) -> np.ndarray:
    found, right = recall(means), precision(means)
    return ratio(2 * right * found, right + found)


def score(text: str, doc: Doc) -> Record:
    answer = doc.truth["answer"]
    if answer.lower().strip() not in ANSWERS:
        raise RerouteError(f"question {doc.question_id}: answer is {answer!r}, expected yes or no")
    unparsed = text.lower().strip() not in ANSWERS
    return {"truth": answer, "unparsed": unparsed, "metrics": pope_outcome(text, answer)}


def stand_in(split: str, family: str) -> Iterator[DataRow]:
    """Yes/no questions about rendered scenes, as many of either answer."""
    for index, row in enumerate(vqa_rows(split, SPLIT_LENGTH, ("yesno",), family=family)):
        yield {
            "id": str(index),
            "question_id": row["question_id"],
            "question": row["question"],
            "answer": row["answer"],
            "image_source": row["question_id"],
            "image": row["image"],
            "category": STAND_IN_CATEGORIES[index % len(STAND_IN_CATEGORIES)],
        }


BENCHMARK = vqa.Benchmark(
    name=NAME,
    about="POPE's yes/no questions, with all visual tokens and with routed ones.",
    hub=HUB,
    columns=COLUMNS,
    prompt=prompt,
    score=score,
    metrics=METRICS,
    stand_in=stand_in,
    max_new_tokens=MAX_NEW_TOKENS,
    key="id",
    cluster=lambda row: identifier("image_source", row["image_source"]),  # an image is asked about several times
    derived={"pope_precision": precision, "pope_recall": recall, "pope_f1_score": f1_score},
)
main = partial(vqa.main, BENCHMARK)

if __name__ == "__main__":
    sys.exit(main())
