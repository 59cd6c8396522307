"""Answers that a task cannot read, and those cut off, are counted, and told of where they are many."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evals import gqa, mmbench, mme, pope, refcoco, scenes_vqa, scienceqa, table, textvqa, vqav2
from evals.harness import vqa
from evals.harness.data import Doc
from evals.harness.readability import shares, warnings
from tests.evals.harness.test_data import encoded, photo, row, write
from tests.evals.stub import StubModel

OPTIONS = {"A": "oak", "B": "pine", "C": "nan", "D": "nan"}
CASES = {
    pope: ({"answer": "yes"}, ["yes", "No"], ["Yes.", "", "there is"]),
    mme: ({"answer": "Yes", "category": "color"}, ["Yes.", "y", "nothing"], ["", "Sure, yes", "maybe"]),
    mmbench: (
        {"index": 1, "answer": "A", "category": "ocr", "L2-category": "x", **OPTIONS},
        ["A", "(B)", "E", "an oak"],
        ["", "Neither", "A or B"],
    ),
    scienceqa: ({"answer": 1, "choices": ["one", "two"]}, ["b", "A.", "B. two"], ["", "(B)", "C", "The answer is B"]),
    gqa: ({"answer": "left"}, ["right", "no idea"], ["", " ", "..."]),
    textvqa: ({"answers": ["stop"] * 10}, ["go", "2"], ["", "the", "?"]),
    vqav2: ({"answers": [{"answer": "stop", "answer_id": n} for n in range(10)]}, ["go"], ["", "a"]),
    scenes_vqa: ({"answer": "red", "category": "colour"}, ["blue", "x"], [""]),
}


@pytest.mark.parametrize("module", CASES, ids=lambda module: module.__name__)
def test_each_task_says_what_it_cannot_read(module: Any) -> None:
    truth, read, unread = CASES[module]
    for texts, expected in ((read, False), (unread, True)):
        for text in texts:
            scored = module.BENCHMARK.score(text.strip(), Doc(0, "q", None, None, "", truth))
            assert scored["unparsed"] is expected, text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[0.1, 0.1, 0.5, 0.5]", False),
        ("[0, 0, 0, 0]", False),
        ("(1, 2, 3, 4)", False),
        ("[0.1, 0.1", True),
        ("", True),
    ],
)
def test_boxes_that_are_none(tmp_path: Path, text: str, expected: bool) -> None:
    source = refcoco.rec_source(str(write(tmp_path / "x.parquet", [row("q", encoded(photo(), "PNG"), ["a"])])), None)
    task = refcoco.make_task(source, None, "short", "pixel", 2, 8)
    assert task.score(text, next(task.docs(0)))["unparsed"] is expected


def record(text: str, unparsed: bool = False, finish: str | None = "stop") -> dict[str, Any]:
    return {"question_id": text, "text": text, "unparsed": unparsed, "finish": finish}


def test_shares_and_warnings() -> None:
    good = [record("good")] * 8
    assert shares(good) == {"unparsed": 0, "cut_off": 0}
    two = [*good, record("odd\ud800", unparsed=True), record("long" * 99, finish="length")]
    assert shares(two) == {"unparsed": 0.1, "cut_off": 0.1}
    assert warnings("full", [*two, *two]) == []
    odd = [*two, record("odder", unparsed=True), record("x", unparsed=True, finish="length")]
    first, second = warnings("full", [*odd[8:], *good[:4]])
    assert first.startswith(r"full: 38% of the answers could not be read, as that to question odd")
    assert r"'odd\ud800': check the prompt" in first
    assert "full: 25% of the answers were cut off at the limit" in second
    assert second.endswith("longlong'...: give a larger --max-new-tokens")
    assert len(second) < 800


def test_unknown_ends_are_not_called_nought() -> None:
    assert shares([record("a", finish=None), record("b")]) == {"unparsed": 0, "cut_off": None}


class Cut(StubModel):
    """Says nothing that can be read, and stops at the limit."""

    def answer(self, questions, **limits):
        texts = super().answer(questions, **limits)
        return [SimpleNamespace(text="I think that", finish_reason="length") for _ in texts]


@pytest.mark.parametrize("command", [refcoco, pope, table])
def test_summary_lines_and_report_tell(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for module in (refcoco, vqa, table):
        monkeypatch.setattr(module, "load_model", lambda *arguments, **options: Cut())
    routes = ["--methods", "uniform", "--budgets", "64"] if command is table else ["--method", "none"]
    assert command.main([*routes, "--limit", "4", "--out", str(tmp_path)]) == 0
    folder = tmp_path / "scenes-llava" / "refcoco" if command is table else tmp_path
    found = json.loads((folder / "summary.json").read_text())
    assert found["runs"]["full"]["answers"] == {"unparsed": 1, "cut_off": 1}
    assert "full: 100% of the answers could not be read, as that to question" in found["warnings"][0]
    lines = [json.loads(line) for line in next(folder.rglob("full.jsonl")).read_text().splitlines()]
    assert {(line["unparsed"], line["finish"]) for line in lines} == {(True, "length")}
    said = capsys.readouterr().out
    assert "Warning: " in said
    assert "'I think that': give a larger --max-new-tokens" in said
    if command is table:
        assert "Warning: refcoco, full: 100%" in (tmp_path / "table.md").read_text()
        assert ",1.0,1.0," in (tmp_path / "table.csv").read_text()
    else:
        assert "\nanswers  unparsed  cut off\nfull       100.0%   100.0%\n" in said


def test_true_boxes_out_of_the_image_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(refcoco, "load_model", lambda *arguments, **options: StubModel())
    boxes = {"in": [0, 0, 96, 64], "left": [-3, 0, 9, 9], "below": [90, 60, 6, 9], "beyond": [200, 200, 9, 9]}
    rows = [row(name, encoded(photo(), "PNG"), ["a"], list(map(float, box))) for name, box in boxes.items()]
    file = write(tmp_path / "x.parquet", rows)
    assert refcoco.main(["--data", str(file), "--method", "none", "--out", str(tmp_path / "o")]) == 0
    noted = {"true box reaches out of the image": ["left", "below", "beyond"]}
    assert json.loads((tmp_path / "o" / "summary.json").read_text())["noted"] == noted
    said = capsys.readouterr().out
    assert "Noted: true box reaches out of the image: 3 (question_id left, below, beyond)" in said
