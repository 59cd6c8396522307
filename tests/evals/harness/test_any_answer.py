"""No answer, however odd, raises or gives a number that is not finite: in a line, once finished, or derived."""

import json
from functools import cache
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals import gqa, mmbench, mme, pope, refcoco, scenes_vqa, scienceqa, textvqa, vqav2
from evals.harness import vqa
from evals.harness.data import SCENES, Doc, rec_source
from evals.harness.metrics import estimator, matrix, means
from evals.harness.runner import Task

ROW_BENCHMARKS = [one.BENCHMARK for one in (gqa, mmbench, mme, pope, scenes_vqa, scienceqa, textvqa, vqav2)]
NAMES = [benchmark.name for benchmark in ROW_BENCHMARKS]
QUESTIONS = 6
PIECES = (
    *("yes", "No", "A", "b.", "(C)", ":D).", "E", "nan", "red", "2", "two", "Failed to obtain answer via API"),
    *("[", "]", "(", ")", ",", ".", "1e999", "-0", "0.5", "9" * 400, "[0.1, 0.1, 0.5, 0.5]", "(5, 5, 1, 1)"),
    *("NaN", "inf", "'s", "dont", "\n", "\t", "\x00", "\N{FULLWIDTH DIGIT FIVE}", "[1, 1, 1, 1]", "\ud800"),
)
NUMBERS = st.sampled_from(["0", "-0", "0.5", "1", "-7", "1000", "0." + "0" * 400 + "1", "9" * 400, "-" + "9" * 400])
BOXES = st.lists(NUMBERS, min_size=4, max_size=4).map(lambda box: f"[{', '.join(box)}]")
ANSWERS = st.text() | st.lists(st.sampled_from(PIECES), max_size=12).map(" ".join) | BOXES


@cache
def row_docs(name: str) -> tuple[Task, list[Doc]]:
    (benchmark,) = (one for one in ROW_BENCHMARKS if one.name == name)
    task = vqa.make_task(benchmark, vqa.row_source(benchmark, SCENES, None), QUESTIONS, 16)
    return task, list(islice(task.docs(0), QUESTIONS))


@cache
def boxes(coord_format: str) -> tuple[Task, Doc]:
    task = refcoco.make_task(rec_source(SCENES, None), 1, "full", coord_format, 2, 16, lambda image: (56, 84))
    return task, next(task.docs(0))


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=40)
@given(st.data())
def test_row_benchmarks(name: str, data: st.DataObject) -> None:
    task, docs = row_docs(name)
    lines = []
    for doc in docs:
        identity = {"question_id": doc.question_id, "cluster": doc.cluster or doc.question_id}
        lines.append(identity | task.score(data.draw(ANSWERS).strip(), doc))
    finished = task.finish(lines)
    json.dumps([lines, finished], allow_nan=False)
    rows = [record["metrics"] for record in finished]
    columns = sorted({column for row in rows for column in row})
    assert columns
    names = [*columns, *task.derived]
    assert np.isfinite(estimator(columns, names, task.derived)(means(matrix(rows, columns)))).all()


@pytest.mark.parametrize("coord_format", ["normalized", "pixel", "scale_1000"])
@settings(deadline=None)
@given(ANSWERS)
def test_boxes(coord_format: str, answer: str) -> None:
    task, doc = boxes(coord_format)
    scored = task.score(answer.strip(), doc)
    json.dumps(scored, allow_nan=False)
    assert np.isfinite(list(scored["metrics"].values())).all()
