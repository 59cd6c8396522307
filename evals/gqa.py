"""GQA, test-dev balanced: open questions with one-word answers. `python -m evals.gqa --help`.

Follows lmms-eval v0.7.1, whose exact match is that of Hugging Face's `evaluate` with case and punctuation ignored.
"""

import string
import sys
from collections.abc import Iterator
from functools import partial

from evals.harness import prompts, vqa
from evals.harness.columns import DataRow, Hub, ImageTable
from evals.harness.data import Doc
from evals.harness.runner import Record
from evals.scenes.data import vqa_rows
from evals.scenes.world import SPLIT_LENGTH
from reroute_jax.errors import RerouteError

NAME = "gqa"
HUB = Hub(
    "lmms-lab/GQA",
    "testdev_balanced_instructions",
    "testdev",
    ImageTable(config="testdev_balanced_images", split="testdev", on="imageId", key="id"),
)
COLUMNS = {"id": str, "imageId": str, "question": str, "answer": str}
METRICS = ("exact_match",)
MAX_NEW_TOKENS = 16
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def prompt(row: DataRow) -> str:
    return prompts.single_word(row["question"])


def gqa_match(text: str, answer: str) -> float:
    """1 where both read the same in lower case and without ASCII punctuation. Spaces inside count."""
    return float(_plain(text.strip()) == _plain(answer))


def score(text: str, doc: Doc) -> Record:
    answer = doc.truth["answer"]
    if not _plain(answer).strip():
        raise RerouteError(f"question {doc.question_id}: answer is {answer!r}, which nothing can be compared with")
    unparsed = not _plain(text.strip())
    return {"truth": answer, "unparsed": unparsed, "metrics": {"exact_match": gqa_match(text, answer)}}


def stand_in(split: str, family: str) -> Iterator[DataRow]:
    """Questions of every kind about rendered scenes."""
    for row in vqa_rows(split, SPLIT_LENGTH, family=family):
        name = row["question_id"]
        yield {"id": name, "imageId": name, **{key: row[key] for key in ("question", "answer", "image")}}


def _plain(text: str) -> str:
    return text.lower().translate(_NO_PUNCTUATION)


BENCHMARK = vqa.Benchmark(
    name=NAME,
    about="GQA's questions, with all visual tokens and with routed ones.",
    hub=HUB,
    columns=COLUMNS,
    prompt=prompt,
    score=score,
    metrics=METRICS,
    stand_in=stand_in,
    max_new_tokens=MAX_NEW_TOKENS,
    key="id",
    cluster=lambda row: row["imageId"],
)
main = partial(vqa.main, BENCHMARK)

if __name__ == "__main__":
    sys.exit(main())
