import json
from dataclasses import replace
from pathlib import Path

import pytest

from evals.data import rec_source
from evals.refcoco import make_task
from evals.runner import Run, Task, answer, fingerprint, open_folder
from reroute_jax.errors import RerouteError
from tests.evals.stub import StubModel

BATCH = 4
TOTAL = 10


@pytest.fixture
def task() -> Task:
    return make_task(rec_source("scenes", None), TOTAL, "full", "normalized", 2, 16)


def full() -> Run:
    return Run("full", StubModel().plan("none"))


def test_one_json_line_per_question(task: Task, tmp_path: Path) -> None:
    model = StubModel()
    records = answer(model, task, full(), tmp_path, BATCH)
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


@pytest.mark.parametrize("part", [i / 13 for i in range(14)])
def test_a_run_cut_anywhere_resumes_to_the_same_bytes(task: Task, tmp_path: Path, part: float) -> None:
    """`part` of the bytes survives, as after a kill in mid-write; whole batches are not asked again."""
    answer(StubModel(), task, full(), tmp_path, BATCH)
    file = tmp_path / "full.jsonl"
    whole = file.read_bytes()
    keep = int(part * len(whole))
    file.write_bytes(whole[:keep])
    model = StubModel()
    answer(model, task, full(), tmp_path, BATCH)
    assert file.read_bytes() == whole
    lines = whole[:keep].count(b"\n")
    kept = lines if lines == TOTAL else lines // BATCH * BATCH
    assert sum(model.batches) == TOTAL - kept


def test_a_finished_run_asks_nothing(task: Task, tmp_path: Path) -> None:
    answer(StubModel(), task, full(), tmp_path, BATCH)
    model = StubModel()
    records = answer(model, task, full(), tmp_path, BATCH)
    assert model.batches == []
    assert len(records) == TOTAL


def test_ctrl_c_keeps_the_batches_answered(task: Task, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        answer(StubModel(interrupt_after=2), task, full(), tmp_path, BATCH)
    assert (tmp_path / "full.jsonl").read_bytes().count(b"\n") == 2 * BATCH


def test_a_damaged_line_is_refused_by_number(task: Task, tmp_path: Path) -> None:
    answer(StubModel(), task, full(), tmp_path, BATCH)
    file = tmp_path / "full.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    for damaged in (b"{oops\n", b"[]\n", b"{}\n", lines[4]):
        file.write_bytes(b"".join([*lines[:2], damaged, *lines[3:]]))
        with pytest.raises(RerouteError, match=r"line 3 of .*full\.jsonl is no answer to question 2: delete it"):
            answer(StubModel(), task, full(), tmp_path, BATCH)


def test_more_answers_than_questions_are_refused(task: Task, tmp_path: Path) -> None:
    answer(StubModel(), task, full(), tmp_path, BATCH)
    with pytest.raises(RerouteError, match="has 8 answers for 6 questions"):
        answer(StubModel(), replace(task, total=6, docs=lambda start: iter(())), full(), tmp_path, BATCH)


def test_a_folder_takes_the_same_settings_only(tmp_path: Path) -> None:
    settings = {"budget": 64, "runs": {"full": {"stages": [0, 1]}}}
    folder = tmp_path / "a" / "b"
    open_folder(folder, settings)
    open_folder(folder, {"runs": {"full": {"stages": (0, 1)}}, "budget": 64})
    with pytest.raises(RerouteError, match=r"other settings \(budget: 64 there, 128 now\): give another --out"):
        open_folder(folder, settings | {"budget": 128})
    with pytest.raises(RerouteError, match=r"extra: None there, 1 now"):
        open_folder(folder, settings | {"extra": 1})


def test_a_folder_that_is_not_a_run_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "full.jsonl").write_text("{}\n")
    with pytest.raises(RerouteError, match=r"holds answers but no settings\.json"):
        open_folder(tmp_path, {})
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(RerouteError, match=r"settings\.json is not JSON"):
        open_folder(tmp_path, {})


def test_fingerprint_sees_names_sizes_and_both_ends(tmp_path: Path) -> None:
    content = bytearray(300_000)

    def write(name: str = "a.safetensors") -> str:
        for old in tmp_path.iterdir():
            old.unlink()
        (tmp_path / name).write_bytes(content)
        return fingerprint(tmp_path)

    seen = [write(), write("b.safetensors")]
    assert write() == seen[0]
    for position in (0, 299_999):
        content[position] = 1
        seen.append(write())
    content.append(0)
    seen.append(write())
    assert len(set(seen)) == 5
    assert fingerprint(tmp_path / "a.safetensors")
