import json
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from evals.harness.data import BadImage, rec_source
from evals.harness.runner import WINDOW, Run, Task, answer
from evals.refcoco import make_task
from reroute_jax.errors import RerouteError
from tests.evals import slow_run
from tests.evals.stub import StubModel

BATCH = 4
TOTAL = 10
# Of the bytes of a run, that survive.
PARTS = [pytest.param(i / 13, marks=pytest.mark.slow) if 0 < i < 13 and i % 2 else i / 13 for i in range(14)]


@pytest.fixture
def task() -> Task:
    return make_task(rec_source("scenes", None), TOTAL, "full", "normalized", 2, 16)


def full() -> Run:
    return Run("full", StubModel().plan("none"))


def test_one_json_line_per_question(task: Task, tmp_path: Path) -> None:
    model = StubModel()
    records = answer(model, task, [(full(), tmp_path)], BATCH)["full"]
    lines = (tmp_path / "full.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == records
    assert [record["doc_id"] for record in records] == list(range(TOTAL))
    assert model.batches == [4, 4, 2]
    assert model.max_new_tokens == {16}
    doc = next(task.docs(0))
    first = records[0]
    assert (first["task"], first["question_id"], first["prompt"]) == ("refcoco", doc.question_id, task.prompt(doc))
    assert first["text"] == model._answer(doc.image, first["prompt"], "none")  # raw, not stripped
    assert first["image_size"] == list(doc.size)
    assert first["visual_grid"] == [8, 8]
    assert first["text_tokens"] == 4 + len(first["prompt"].split())
    assert tuple(first["truth"]) == doc.truth
    assert set(first) >= {"parsed", "box", "metrics"}


@pytest.mark.parametrize("part", PARTS)
def test_a_run_cut_anywhere_resumes_to_the_same_bytes(task: Task, tmp_path: Path, part: float) -> None:
    """`part` of the bytes survives, as after a kill in mid-write; whole batches are not asked again."""
    answer(StubModel(), task, [(full(), tmp_path)], BATCH)["full"]
    file = tmp_path / "full.jsonl"
    whole = file.read_bytes()
    keep = int(part * len(whole))
    file.write_bytes(whole[:keep])
    model = StubModel()
    answer(model, task, [(full(), tmp_path)], BATCH)["full"]
    assert file.read_bytes() == whole
    lines = whole[:keep].count(b"\n")
    kept = lines if lines == TOTAL else lines // BATCH * BATCH
    assert sum(model.batches) == TOTAL - kept


class NarrowRefused(StubModel):
    """Refuses the form of one image, as Qwen's resize does."""

    def __init__(self, refused: bytes) -> None:
        super().__init__()
        self.refused = refused

    def visual_grid(self, image) -> tuple[int, int]:
        if image.tobytes() == self.refused:
            raise RerouteError("an image has 1 x 900 pixels: expected sides of a ratio up to 200")
        return super().visual_grid(image)


def test_an_image_of_a_form_that_the_model_does_not_take_is_a_bad_row(task: Task, tmp_path: Path) -> None:
    docs = list(task.docs(0))
    model = NarrowRefused(docs[5].image.tobytes())
    bad = [doc.doc_id for doc in docs if doc.image.tobytes() == model.refused]
    with pytest.raises(BadImage, match=rf"^refcoco, question_id {docs[5].question_id}: an image has 1 x 900") as caught:
        answer(model, task, [(full(), tmp_path)], BATCH)["full"]
    assert str(caught.value).endswith("repair it or give --skip-bad")
    records = answer(model, replace(task, skip_bad=True), [(full(), tmp_path)], BATCH)["full"]
    assert [record["doc_id"] for record in records if record.get("left_out") == "bad image"] == bad
    assert all(record["why"] == str(caught.value) for record in records if "why" in record)
    assert sum(model.batches) == TOTAL - len(bad)


class TextRefused(StubModel):
    """Refuses the text of one question, as a chat layout does where an image's placeholder stands in it."""

    def question(self, item: tuple) -> tuple:
        if "word <image>" in item[1]:
            raise RerouteError("the text 'word <image>' holds the image placeholder '<image>'")
        return item


def test_a_text_that_the_model_does_not_take_is_a_bad_row(task: Task, tmp_path: Path) -> None:
    odd = replace(task, prompt=lambda doc: "word <image>" if doc.doc_id == 6 else "word")
    asked = list(task.docs(0))[6]
    expected = rf"^refcoco, question_id {asked.question_id}: the text 'word <image>'.*--skip-bad"
    with pytest.raises(RerouteError, match=expected):
        answer(TextRefused(), odd, [(full(), tmp_path)], BATCH)
    model, fresh = TextRefused(), tmp_path / "fresh"
    fresh.mkdir()
    records = answer(model, replace(odd, skip_bad=True), [(full(), fresh)], BATCH)["full"]
    assert [record.get("left_out") for record in records] == [None] * 6 + ["bad question"] + [None] * (TOTAL - 7)
    assert sum(model.batches) == TOTAL - 1


def test_a_finished_run_asks_nothing(task: Task, tmp_path: Path) -> None:
    answer(StubModel(), task, [(full(), tmp_path)], BATCH)["full"]
    model = StubModel()
    records = answer(model, task, [(full(), tmp_path)], BATCH)["full"]
    assert model.batches == []
    assert len(records) == TOTAL


def test_ctrl_c_keeps_the_batches_answered(task: Task, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        answer(StubModel(interrupt_after=2), task, [(full(), tmp_path)], BATCH)["full"]
    assert (tmp_path / "full.jsonl").read_bytes().count(b"\n") == 2 * BATCH


def test_a_damaged_line_is_refused_by_number(task: Task, tmp_path: Path) -> None:
    answer(StubModel(), task, [(full(), tmp_path)], BATCH)["full"]
    file = tmp_path / "full.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    for damaged in (b"{oops\n", b"[]\n", b"{}\n", lines[4], b"\xe9\n", b"\0\n", b"[" * 99_999 + b"\n"):
        file.write_bytes(b"".join([*lines[:2], damaged, *lines[3:]]))
        with pytest.raises(RerouteError, match=r"line 3 of .*full\.jsonl .*: delete it and run again"):
            answer(StubModel(), task, [(full(), tmp_path)], BATCH)["full"]


def test_answers_with_half_a_surrogate_pair_are_kept(task: Task, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(StubModel, "_answer", lambda *arguments: "a\ud800b")
    answer(StubModel(), task, [(full(), tmp_path)], BATCH)["full"]
    model = StubModel()
    assert {record["text"] for record in answer(model, task, [(full(), tmp_path)], BATCH)["full"]} == {"a\ud800b"}
    assert model.batches == []


def test_records_say_how_answers_ended_where_the_model_does(task: Task, tmp_path: Path) -> None:
    class Ended(StubModel):
        def answer(self, questions, **limits):
            return [replace(found, finish_reason="length") for found in super().answer(questions, **limits)]

    stopped = answer(StubModel(), task, [(full(), tmp_path)], BATCH)["full"]
    (tmp_path / "full.jsonl").unlink()
    told = answer(Ended(), task, [(full(), tmp_path)], BATCH)["full"]
    assert {record["finish"] for record in stopped} == {"stop"}
    assert told == [record | {"finish": "length"} for record in stopped]


def test_prompts_beyond_the_limit_name_their_question(task: Task, tmp_path: Path) -> None:
    long = replace(task, prompt=lambda doc: "word " * (5000 if doc.doc_id == 6 else 5))
    asked = list(task.docs(0))[6]
    with pytest.raises(RerouteError, match=rf"question {asked.question_id} \(document 6\), .* has 5004: .* most 4096"):
        answer(StubModel(), long, [(full(), tmp_path)], BATCH)["full"]


def test_more_answers_than_questions_are_refused(task: Task, tmp_path: Path) -> None:
    answer(StubModel(), task, [(full(), tmp_path)], BATCH)["full"]
    with pytest.raises(RerouteError, match="has 10 answers for 6 questions"):
        answer(StubModel(), replace(task, total=6, docs=lambda start: iter(())), [(full(), tmp_path)], BATCH)["full"]


def worker_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_ctrl_c_and_errors_leave_no_thread_behind(task: Task, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        answer(StubModel(interrupt_after=1), task, [(full(), tmp_path)], BATCH)["full"]
    assert worker_threads() == []

    def docs(start: int):
        yield from islice(task.docs(start), 9 - start)
        raise RerouteError("question 9 is broken")

    with pytest.raises(RerouteError, match="question 9 is broken"):
        answer(StubModel(), replace(task, docs=docs), [(full(), tmp_path)], 2)["full"]
    assert worker_threads() == []
    assert (tmp_path / "full.jsonl").read_bytes().count(b"\n") == 8  # the window before


def test_questions_are_made_ready_in_another_thread(task: Task, tmp_path: Path) -> None:
    class Threads(StubModel):
        def question(self, item):
            self.thread = threading.current_thread().name
            return super().question(item)

    model = Threads()
    answer(model, task, [(full(), tmp_path)], BATCH)["full"]
    assert model.thread.startswith("ahead")


def test_runs_share_what_is_prepared_and_each_goes_on_where_it_was(task: Task, tmp_path: Path) -> None:
    """Two runs, one of them cut in its second batch: questions are prepared once, files are those of runs alone."""

    class Counting(StubModel):
        prepared = 0

        def question(self, item):
            self.prepared += 1
            return super().question(item)

    runs = [full(), Run("pdrop", StubModel().plan("pdrop", budget=128))]
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    for run in runs:
        answer(StubModel(), task, [(run, alone)], BATCH)
    cut = (alone / "full.jsonl").read_bytes().splitlines(keepends=True)[: BATCH + 1]
    (together / "full.jsonl").write_bytes(b"".join(cut) + b'{"half a li')
    model = Counting()
    records = answer(model, task, [(run, together) for run in runs], BATCH)
    assert model.prepared == TOTAL
    for name in records:
        assert (together / f"{name}.jsonl").read_bytes() == (alone / f"{name}.jsonl").read_bytes()


def test_batches_hold_images_of_like_size_and_lines_keep_the_order(tmp_path: Path) -> None:
    model = slow_run.MixedModel()
    records = slow_run.run(model, tmp_path)
    assert [record["doc_id"] for record in records] == list(range(slow_run.TOTAL))
    assert len({size for batch in model.sizes for size in batch}) == 4
    windows = [model.sizes[start : start + WINDOW] for start in range(0, len(model.sizes), WINDOW)]
    assert [len(window) for window in windows] == [4, 4, 4, 3]
    for window in windows:
        sizes = [size for batch in window for size in batch]
        assert sizes == sorted(sizes)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("mixed")
    slow_run.run(slow_run.MixedModel(), folder)
    return (folder / "full.jsonl").read_bytes()


@pytest.mark.parametrize("part", PARTS)
def test_sorted_batches_cut_anywhere_resume_to_the_same_bytes(mixed: bytes, tmp_path: Path, part: float) -> None:
    """The answers of this model depend on their batch, so that the batches have to be the same ones."""
    keep = int(part * len(mixed))
    (tmp_path / "full.jsonl").write_bytes(mixed[:keep])
    model = slow_run.MixedModel()
    slow_run.run(model, tmp_path)
    assert (tmp_path / "full.jsonl").read_bytes() == mixed
    assert sum(model.batches) <= slow_run.TOTAL - mixed[:keep].count(b"\n") + WINDOW * slow_run.BATCH


def test_killed_run_resumes_to_the_same_bytes(mixed: bytes, tmp_path: Path) -> None:
    """kill -9 from outside, in the middle of the second window or behind it."""
    file, config, least = tmp_path / "full.jsonl", tmp_path / "config.pickle", 15
    config.write_bytes(pickle.dumps(slow_run.MixedModel().config))
    command = [sys.executable, "-m", "tests.evals.slow_run", str(tmp_path)]
    with config.open("rb") as given:
        process = subprocess.Popen(command, cwd=Path(__file__).parents[3], stdin=given)
    while process.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") < least):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert least <= file.read_bytes().count(b"\n") < slow_run.TOTAL
    slow_run.run(slow_run.MixedModel(), tmp_path)
    assert file.read_bytes() == mixed
