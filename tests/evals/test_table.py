"""The matrix command: what it runs, what it leaves alone, and that its numbers are those of the summaries."""

import csv
import json
import zlib
from dataclasses import replace
from functools import cache
from itertools import islice, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from evals import gqa, pope, table
from evals.harness import prompts
from evals.harness.data import rec_docs, rec_source
from evals.harness.matrix import draw
from reroute_jax.routing.presets import PRESETS
from tests.evals.harness.test_data import encoded, photo, row, write
from tests.evals.stub import StubModel

SMALL = ["--methods", "fastv,pdrop", "--budgets", "64,128", "--limit", "12", "--batch-size", "4"]
RUNS = product((64, 128), ("fastv", "pdrop"), ("delete", "reroute"))
MATRIX = [f"{method}-{action}-{budget}" for budget, method, action in RUNS]


@cache
def truths() -> dict[tuple[bytes, str], str]:
    """The answers to the first questions about the scenes."""
    docs = rec_docs(rec_source("scenes", None), 0, 40, 2)
    found = {(doc.image.tobytes(), prompts.rec(doc.text, "full")): str(list(doc.truth)) for doc in docs}
    for benchmark in (pope.BENCHMARK, gqa.BENCHMARK):
        for asked in islice(benchmark.stand_in("test", "llava"), 40):
            found[asked["image"].tobytes(), benchmark.prompt(asked)] = asked["answer"]
    return found


class Talker(StubModel):
    """Right about two questions in three: which ones hangs on question and schedule alone."""

    def _answer(self, image, prompt: str, label: str) -> str:
        right = zlib.crc32(image.tobytes() + prompt.encode() + label.encode()) % 3
        return truths().get((image.tobytes(), prompt), "none") if right else "[0, 0, 0.1, 0.1]"


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[StubModel]:
    """Those that were loaded, in order."""
    loaded: list[StubModel] = []

    def load(*arguments: object, **options: object) -> StubModel:
        loaded.append(Talker())
        return loaded[-1]

    monkeypatch.setattr(table, "load_model", load)
    monkeypatch.setattr(table, "draw", lambda sheets, files: [file.touch() for file in files])
    monkeypatch.chdir(tmp_path)
    return loaded


def run(*arguments: object, code: int = 0) -> None:
    assert table.main(list(map(str, arguments))) == code


def lines(folder: Path) -> list[dict[str, str]]:
    with open(folder / "table.csv", newline="") as file:
        return list(csv.DictReader(file))


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def refusal(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The one line of a command that exits with 2 before it loads a model or makes a folder."""
    try:
        code = table.main(list(map(str, arguments)))
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert (code, said.out) == (2, "")
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert not Path("runs").exists()
    return said.err


def test_one_load_and_one_full_run_serve_the_whole_matrix(tmp_path: Path, models: list[StubModel]) -> None:
    run("--tasks", "refcoco,pope", *SMALL, "--out", tmp_path / "o")
    assert len(models) == 1
    assert sum(models[0].batches) == 2 * 12 * (1 + len(MATRIX))
    for task in ("refcoco", "pope"):
        folder = tmp_path / "o" / "scenes-llava" / task
        assert {file.parent.name for file in folder.glob("*/*.jsonl")} == {"full", *MATRIX}
        assert list(summary(folder)["runs"]) == ["full", *MATRIX]
    assert {file.name for file in (tmp_path / "o").iterdir()} == {
        ".lock",
        "scenes-llava",
        "index.html",
        "table.md",
        "table.csv",
        "figure.png",
        "figure.svg",
    }


def test_the_page_has_every_task_with_its_questions_and_pairs(tmp_path: Path) -> None:
    run("--tasks", "refcoco,pope", *SMALL, "--out", tmp_path)
    html = (tmp_path / "index.html").read_text()
    assert html.count('class="pg-board"') == 2
    assert html.count('data-number="') == 2 * 12
    for entry in MATRIX:
        assert f'<th scope="row">{entry}</th>' in html
    assert html.count(" against ") >= 2
    assert f"python -m evals.show --run {tmp_path / 'scenes-llava' / 'pope'}" in html


def test_numbers_are_those_of_the_summaries(tmp_path: Path) -> None:
    run("--tasks", "refcoco,pope,gqa", "--methods", "pdrop", "--limit", "40", "--out", tmp_path)
    found = lines(tmp_path)
    assert len(found) == (1 + 6) * (3 + 2)
    metrics = {"refcoco": "refcoco_ACC@0.5", "pope": "pope_accuracy", "gqa": "exact_match"}
    summaries = {task: summary(tmp_path / "scenes-llava" / task) for task in metrics}
    bounds = 0
    for line in found:
        if line["task"] == "average":
            continue
        of = summaries[line["task"]]
        values = of["runs"][line["answers"]]
        assert line["metric"] == metrics[line["task"]]
        assert float(line["score"]) == values["metrics"][line["metric"]]
        assert int(line["questions"]) == of["questions"] == 40
        cost = values["cost"]
        assert float(line["average_visual_tokens"]) == cost["average_visual_tokens"]
        assert float(line["share_percent"]) == pytest.approx(100 * cost["average_visual_tokens"] / 64)
        if line["answers"] == "full":
            assert line["retention_percent"] == line["gain"] == ""
            continue
        kept = values["retention_percent"][line["metric"]]
        for column, name in (("retention_percent", "value"), ("retention_low", "low"), ("retention_high", "high")):
            assert (line[column] == "") == (kept[name] is None)
            if kept[name] is not None:
                assert float(line[column]) == pytest.approx(kept[name])
                bounds += 1
    assert bounds == 6 * 3 * 3


def test_average_and_gain_are_the_papers(tmp_path: Path) -> None:
    """Average: the mean over tasks of score / full score. Gain: reroute's less deletion's at that method and budget."""
    small = ["--methods", "pdrop", "--budgets", "64,128", "--limit", "40"]
    run("--tasks", "refcoco,pope,gqa", *small, "--out", tmp_path)
    found = {(line["kind"], line["task"], line["answers"]): line for line in lines(tmp_path)}

    names = [name for name in MATRIX if name.startswith("pdrop")]

    def kept(kind: str, name: str) -> float:
        tasks = {"grounding": ["refcoco"], "answering": ["pope", "gqa"]}[kind]
        shares = []
        for task in tasks:
            score, full = (float(found[kind, task, of]["score"]) for of in (name, "full"))
            shares.append(100 * score / full)
        return float(np.mean(shares))

    for kind in ("grounding", "answering"):
        for name in names:
            line = found[kind, "average", name]
            assert float(line["retention_percent"]) == pytest.approx(kept(kind, name))
            assert float(line["retention_low"]) <= float(line["retention_percent"]) <= float(line["retention_high"])
            if "delete" in name:
                assert line["gain"] == ""
                continue
            gain = kept(kind, name) - kept(kind, name.replace("reroute", "delete"))
            assert float(line["gain"]) == pytest.approx(gain)
            assert float(line["gain_low"]) < float(line["gain_high"])
    one, average = found["grounding", "refcoco", names[0]], found["grounding", "average", names[0]]
    assert one["retention_low"] == average["retention_low"]  # of one task, the average is that task
    text = (tmp_path / "table.md").read_text()
    assert f"{float(found['answering', 'average', names[1]]['gain']):+.1f} (" in text
    assert f"| {names[0]} |" in text


def test_what_is_done_is_not_asked_again(tmp_path: Path, models: list[StubModel]) -> None:
    run("--tasks", "refcoco", *SMALL, "--out", tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.jsonl")}
    text = (tmp_path / "table.md").read_text()
    run("--tasks", "refcoco", *SMALL, "--out", tmp_path)
    assert models[1].batches == []
    assert (tmp_path / "table.md").read_text() == text
    (tmp_path / "scenes-llava" / "refcoco" / MATRIX[3] / f"{MATRIX[3]}.jsonl").write_bytes(b"")
    run("--tasks", "refcoco", *SMALL, "--out", tmp_path)
    assert sum(models[2].batches) == 12
    run("--tasks", "refcoco,pope", *SMALL, "--methods", "fastv,pdrop,uniform", "--out", tmp_path)
    assert sum(models[3].batches) == 12 * 4 + 12 * (1 + len(MATRIX) + 4)
    assert {file: file.read_bytes() for file in before} == before


def test_interrupted_matrix_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run("--tasks", "refcoco", *SMALL, "--out", tmp_path / "whole")
    monkeypatch.setattr(table, "load_model", lambda *arguments, **options: Talker(interrupt_after=5))
    run("--tasks", "refcoco", *SMALL, "--out", tmp_path / "cut", code=130)
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "cut" / "table.md").exists()
    monkeypatch.setattr(table, "load_model", lambda *arguments, **options: Talker())
    run("--tasks", "refcoco", *SMALL, "--out", tmp_path / "cut")
    for name in ("table.md", "table.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_other_settings_are_refused_before_anything_is_asked(
    tmp_path: Path, models: list[StubModel], capsys: pytest.CaptureFixture
) -> None:
    run("--tasks", "refcoco", *SMALL, "--out", tmp_path)
    capsys.readouterr()
    run("--tasks", "refcoco,pope", *SMALL, "--limit", "8", "--out", tmp_path, code=2)
    assert "was made with other settings (questions: 12 there, 8 now)" in capsys.readouterr().err
    assert models[1].batches == []


def deep(monkeypatch: pytest.MonkeyPatch, layers: int) -> None:
    """Every model is LLaVA-1.5 with so many layers."""
    config = SimpleNamespace(family="llava", num_layers=layers, vision=SimpleNamespace(grid=(24, 24)))
    monkeypatch.setattr(table, "open_source", lambda path: SimpleNamespace(config={}, generation={}, folder=None))
    monkeypatch.setattr(table, "read_config", lambda *found: config)


def test_official_configurations_of_another_depth_are_refused_by_name(capsys: pytest.CaptureFixture) -> None:
    said = refusal(capsys, "--official")
    assert "scenes-llava: preset 'llava15_baseline' is for 32 decoder layers and the model has 12" in said


def test_official_configurations_share_the_runs_of_one_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    """19 rows, 13 runs: the stage-wise six are their namesakes' computation. Gains are over the released deletions."""
    deep(monkeypatch, 32)
    args = table._parser().parse_args(["--official"])
    planned = table._planned("llava-hf/llava-1.5-7b-hf", args)
    names = [name for name in PRESETS if name.startswith("llava15_")]
    assert [entry.name for entry in planned.entries] == names
    assert len(names) == 19
    assert len(planned.routes.runs) == 13
    rows = {entry.name: entry for entry in planned.entries}
    assert rows["llava15_baseline"].run == "full"
    assert rows["llava15_ours_vs_fastv_stagewise_avg64"].run == "llava15_ours_vs_fastv_avg64"
    assert rows["llava15_ours_vs_pdrop_avg192"].against == "llava15_pdrop_earlyL2_avg192"
    assert rows["llava15_ours_vs_fastv_avg128"].against == "llava15_fastv_K3_avg128"
    assert rows["llava15_fastv_K3_avg128"].against is None
    schedules = {run.name: run.schedule for run in planned.routes.runs}
    assert [float(stage.ratio) for stage in schedules["llava15_pdrop_earlyL2_avg64"].decisions] == [
        0.2789,
        0.0937,
        0.0315,
        0.0106,
    ]
    assert [stage.action for stage in schedules["llava15_fastv_K3_avg64"].decisions] == ["delete"]


def test_official_rows_carry_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a stub as deep as the released configurations want; the avg64 rows of PDrop say what they really average."""
    deep(monkeypatch, 32)

    class Deep(Talker):
        def __init__(self) -> None:
            super().__init__()
            shallow = self.config
            decoder = replace(shallow.decoder, num_layers=32)
            self.config = replace(shallow, decoder=decoder)

        def visual_grid(self, image) -> tuple[int, int]:
            return 24, 24

    monkeypatch.setattr(table, "load_model", lambda *arguments, **options: Deep())
    run("--official", "--tasks", "refcoco", "--limit", "8", "--out", tmp_path)
    found = {line["configuration"]: line for line in lines(tmp_path) if line["task"] == "refcoco"}
    assert len(found) == 19
    tokens = {name: round(float(line["average_visual_tokens"]), 1) for name, line in found.items()}
    assert tokens["llava15_pdrop_earlyL2_avg64"] == 80.4
    assert tokens["llava15_ours_vs_pdrop_avg64"] == tokens["llava15_ours_vs_pdrop_stagewise_avg64"] == 84.1
    assert tokens["llava15_fastv_K3_avg64"] == 64.0
    assert "share their answers" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--official", "--budgets", "64"], "--official fixes the whole schedules, leave out --budgets"),
        (["--methods", "none"], "always there: leave it out of --methods"),
        (["--methods", "fast"], "'fast' is not one of none, fastv"),
        (["--budgets", "64,64"], "names one of its parts twice"),
        (["--budgets", "some"], "'some' is neither 192, 128, 64 nor a share"),
        (["--methods", "nuwa", "--budgets", "0.9"], "scenes-llava: method 'nuwa' averages at most 4/7"),
        (["--methods", "layout", "--budgets", "0.001"], "fewer than one of 64 visual tokens"),
        (["--tasks", "refcoco,cocos"], "unknown task 'cocos': expected some of refcoco, refcocoplus"),
        (["--tasks", "refcoco:testC"], "testC"),
        (["--tasks", "grounding,refcoco:testA"], "--tasks names refcoco:testA twice"),
        (["--data", "nowhere", "--tasks", "pope"], "no folder nowhere/pope: --data is 'scenes', 'hub', or a folder"),
        (["--models", "scenes-llava,no/where/at/all"], "no/where/at/all"),  # no hub id
    ],
)
def test_bad_input_gives_one_line_before_a_model_is_loaded(
    models: list[StubModel], capsys: pytest.CaptureFixture, arguments: list[str], expected: str
) -> None:
    assert expected in refusal(capsys, *arguments)
    assert models == []


def test_absent_matplotlib_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, models: list[StubModel], capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(table, "find_spec", lambda name: None)
    assert "pip install 'reroute_jax[plot]'" in refusal(capsys, "--tasks", "refcoco")
    assert models == []


def test_local_folder_has_a_folder_for_each_task(tmp_path: Path, models: list[StubModel]) -> None:
    image = encoded(photo(), "JPEG")
    write(tmp_path / "d" / "refcoco" / "testA-0.parquet", [row("q0", image, ["left thing", "thing"])])
    write(tmp_path / "d" / "refcocog" / "test-0.parquet", [row("q1", image, ["another"])])
    tasks = ["--tasks", "refcoco:testA,refcocog:test", "--methods", "uniform"]
    run("--data", tmp_path / "d", *tasks, "--out", tmp_path / "o")
    found = {line["task"]: line["questions"] for line in lines(tmp_path / "o") if line["answers"] == "full"}
    assert found == {"refcoco:testA": "2", "refcocog:test": "1", "average": ""}
    assert (tmp_path / "o" / "scenes-llava" / "refcoco-testA" / "full" / "full.jsonl").exists()


def test_figure_has_a_line_for_each_method_and_action(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "draw", draw)
    run("--tasks", "refcoco", *SMALL, "--methods", "fastv,pool", "--out", tmp_path)
    drawn = (tmp_path / "figure.svg").read_text()
    for label in ("fastv delete", "fastv reroute", "pool", "visual tokens per layer, % of all"):
        assert f"<!-- {label} -->" in drawn
    assert Image.open(tmp_path / "figure.png").size[0] > 500


def test_scores_that_nothing_is_left_of_are_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(StubModel):
        def _answer(self, image, prompt: str, label: str) -> str:
            return "?"

    monkeypatch.setattr(table, "load_model", lambda *arguments, **options: Silent())
    run("--tasks", "refcoco", *SMALL, "--out", tmp_path)
    assert "| 0.0 (n/a) | n/a |" in (tmp_path / "table.md").read_text()
    assert all(line["retention_percent"] == "" for line in lines(tmp_path))


def test_caveats_of_a_model_stand_below_its_table(tmp_path: Path) -> None:
    run("--models", "scenes-llava-bypass", "--tasks", "refcoco", *SMALL, "--out", tmp_path)
    assert "no evidence for a training-free claim" in (tmp_path / "table.md").read_text()
    assert "caveat" in summary(tmp_path / "scenes-llava-bypass" / "refcoco")
