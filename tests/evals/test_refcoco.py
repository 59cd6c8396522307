import json
from pathlib import Path

import numpy as np
import pytest

from convert.embedded import CHECKPOINTS
from evals import refcoco, scenes_vqa
from evals.harness import vqa
from evals.harness.boxes import REC_METRICS
from evals.harness.cli import load_model
from evals.harness.data import rec_source
from tests.evals.harness.test_data import encoded, photo, row, write
from tests.evals.stub import StubModel

QUESTIONS = 12


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StubModel:
    model = StubModel()
    monkeypatch.setattr(refcoco, "load_model", lambda *arguments, **options: model)
    monkeypatch.setattr(vqa, "load_model", lambda *arguments, **options: model)
    monkeypatch.chdir(tmp_path)
    return model


def run(*arguments: object, code: int = 0, limit: int | None = QUESTIONS) -> None:
    limited = [] if limit is None else ["--limit", str(limit)]
    assert refcoco.main([*map(str, arguments), *limited]) == code


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def refusal(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The one line of a command that exits with 2."""
    capsys.readouterr()
    try:
        code = refcoco.main(list(map(str, arguments)))
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err


def test_default_command_reports_both_runs(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    run("--out", tmp_path / "o")
    table = capsys.readouterr().out
    assert "IoU  ACC@0.1  ACC@0.3  ACC@0.5  ACC@0.7  ACC@0.9  Center_ACC" in table
    for line in ("\nfull  ", "\n% of full  ", "\nnuwa-reroute-128  ", "\n  95% interval  ", "KV bytes"):
        assert line in table
    assert {file.name for file in (tmp_path / "o").iterdir()} == {
        ".lock",
        "full.jsonl",
        "nuwa-reroute-128.jsonl",
        "settings.json",
        "summary.json",
    }
    found = summary(tmp_path / "o")
    assert found["questions"] == QUESTIONS
    routed = found["runs"]["nuwa-reroute-128"]
    assert list(routed["metrics"]) == list(routed["retention_percent"]) == list(REC_METRICS)
    assert "retention_percent" not in found["runs"]["full"]
    assert found["differences"] == {}
    assert set(found["versions"]) >= {"jax", "flax", "numpy", "pillow", "transformers"}
    settings = found["settings"]
    assert settings["image_backend"] == "pil"
    assert (settings["prompt_style"], settings["coord_format"], settings["jpeg_roundtrips"]) == (
        "full",
        "normalized",
        2,
    )
    assert (settings["max_new_tokens"], settings["seed"], settings["model"]) == (64, 0, "scenes-llava")


def test_metrics_are_the_means_of_the_lines(tmp_path: Path) -> None:
    run("--out", tmp_path, limit=50)
    runs = summary(tmp_path)["runs"]
    for name, values in runs.items():
        lines = [json.loads(line)["metrics"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for metric in REC_METRICS:
            assert values["metrics"][metric] == pytest.approx(np.mean([line[metric] for line in lines]))
    full, routed = (values["metrics"]["refcoco_IoU"] for values in runs.values())
    assert routed != full
    kept = runs["nuwa-reroute-128"]["retention_percent"]["refcoco_IoU"]
    assert kept["value"] == pytest.approx(100 * routed / full)
    assert kept["low"] < kept["value"] < kept["high"]


def test_cost_is_that_of_the_schedule(tmp_path: Path, stub: StubModel) -> None:
    run("--method", "pdrop", "--action", "delete", "--budget", "64", "--out", tmp_path)
    runs = summary(tmp_path)["runs"]
    full, routed = runs["full"]["cost"], runs["pdrop-delete-64"]["cost"]
    assert full["average_visual_tokens"] == full["visual_tokens"] == 64
    assert routed["nominal_visual_tokens"] == pytest.approx(64 / 9, abs=0.01)
    assert routed["average_visual_tokens"] == pytest.approx(64 / 9, abs=0.5)
    assert routed["average_visual_tokens"] == pytest.approx(routed["kv_visual_tokens"] / 12)
    text = (full["kv_tokens"] - full["kv_visual_tokens"]) / 12
    lengths = [json.loads(line)["text_tokens"] for line in (tmp_path / "full.jsonl").read_text().splitlines()]
    assert text == pytest.approx(np.mean(lengths))
    assert full["kv_bytes"] == pytest.approx(2 * full["kv_tokens"] * 128 * 4)
    assert 0 < routed["prompt_scoring"] < routed["prompt_swiglu"] < full["prompt_swiglu"]


def test_none_runs_all_tokens_only(tmp_path: Path) -> None:
    run("--method", "none", "--out", tmp_path)
    assert list(summary(tmp_path)["runs"]) == ["full"]


def test_compare_gives_paired_differences(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run("--compare", "--controls", "--method", "pdrop", "--budget", "1/9", "--out", tmp_path)
    found = summary(tmp_path)
    pdrop = ["full", "pdrop-delete-0.1111", "pdrop-reroute-0.1111"]
    controls = ["random-reroute-0.1111", "uniform-reroute-0.1111", "pool-0.1111", "layout-0.1111"]
    assert list(found["runs"]) == pdrop + controls
    assert list(found["differences"]) == [f"{pdrop[2]} minus {pdrop[1]}", *(f"{c} minus {pdrop[2]}" for c in controls)]
    means = {name: values["metrics"]["refcoco_IoU"] for name, values in found["runs"].items()}
    for contrast, values in found["differences"].items():
        first, second = contrast.split(" minus ")
        delta = values["refcoco_IoU"]
        assert delta["value"] == pytest.approx(means[first] - means[second])
        assert delta["low"] < delta["value"] < delta["high"]
    delta = found["differences"][f"{pdrop[2]} minus {pdrop[1]}"]["refcoco_IoU"]
    table = capsys.readouterr().out
    assert "\ndifference x 100 " in table
    first, second = table.split(f"\n{pdrop[2]} minus {pdrop[1]} ")[1].splitlines()[:2]
    assert first.split()[0] == f"{100 * delta['value']:+.1f}"
    assert second.split()[2] == f"{100 * delta['low']:+.1f}..{100 * delta['high']:+.1f}"


def test_compare_gives_each_action_its_own_switches(tmp_path: Path) -> None:
    run("--compare", "--controls", "--variant", "flat", "--position-mode", "renumber", "--out", tmp_path)
    runs = summary(tmp_path)["settings"]["runs"]
    assert [len(runs[name]["stages"]) for name in runs if name.startswith("nuwa")] == [2, 5]
    assert {runs[name]["position_mode"] for name in runs if name not in ("full",)} == {"renumber"}


def test_controls_leave_out_the_method_itself(tmp_path: Path) -> None:
    run("--compare", "--controls", "--method", "random", "--seed", "5", "--out", tmp_path)
    runs = summary(tmp_path)["settings"]["runs"]
    assert [runs[name]["seed"] for name in runs if name.startswith("random")] == [5, 5]
    assert len(runs) == 6


def test_decisions_every_layer(tmp_path: Path) -> None:
    run("--method", "fastv", "--decisions", "every:2", "--budget", "0.2", "--out", tmp_path)
    (schedule,) = [s for name, s in summary(tmp_path)["settings"]["runs"].items() if name != "full"]
    assert [stage["lo"] for stage in schedule["stages"]] == [0, 1, 3, 5, 7, 9, 11]


def test_interrupted_command_resumes_to_the_same_files(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, stub: StubModel
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run("--batch-size", 5, "--out", whole)
    monkeypatch.setattr(refcoco, "load_model", lambda *arguments, **options: StubModel(interrupt_after=4))
    capsys.readouterr()
    run("--batch-size", 5, "--out", cut, code=130)
    assert capsys.readouterr().err.endswith("\nstopped: the same command goes on after the last whole batch\n")
    assert not (cut / "summary.json").exists()
    with open(cut / "nuwa-reroute-128.jsonl", "r+b") as lines:
        lines.truncate(700)
    monkeypatch.setattr(refcoco, "load_model", lambda *arguments, **options: stub)
    run("--batch-size", 5, "--out", cut)
    for file in whole.iterdir():
        assert (cut / file.name).read_bytes() == file.read_bytes()


def test_same_command_finds_its_own_default_folder(tmp_path: Path, stub: StubModel) -> None:
    run()
    asked = len(stub.prompts)
    run()
    assert len(stub.prompts) == asked
    run("--budget", "64")
    assert len(list((tmp_path / "runs" / "refcoco").iterdir())) == 2


def test_folder_of_another_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run("--out", tmp_path)
    line = refusal(capsys, "--out", tmp_path, "--limit", QUESTIONS + 1)
    assert (
        f"was made with other settings (questions: {QUESTIONS} there, {QUESTIONS + 1} now): give another --out" in line
    )


def test_parquet_data_with_all_options(tmp_path: Path, stub: StubModel) -> None:
    rows = [row(f"q{i}", encoded(photo(seed=i), "JPEG"), ["a", "b"]) for i in range(3)]
    write(tmp_path / "d" / "testA-00000-of-00001.parquet", rows)
    out = tmp_path / "o"
    options = ["--prompt-style", "nuwa", "--coord-format", "pixel", "--jpeg-roundtrips", "0", "--max-new-tokens", "9"]
    run("--data", tmp_path / "d", "--split", "testA", "--method", "none", "--out", out, *options, limit=None)
    settings = summary(out)["settings"]
    assert settings["questions"] == 6
    assert settings["data"].endswith("d [testA]")
    assert stub.max_new_tokens == {9}
    assert stub.prompts[1] == "Locate b in this image and output the bbox coordinates in JSON format."
    assert settings["jpeg_roundtrips"] == 0
    rows[0]["bbox"][0] = 9.0
    write(tmp_path / "d" / "testA-00000-of-00001.parquet", rows)
    arguments = ["--data", tmp_path / "d", "--split", "testA", "--method", "none", "--out", out, *options]
    assert refcoco.main([str(argument) for argument in arguments]) == 2  # the data changed under the same name


def test_score_reads_boxes_in_the_asked_format(tmp_path: Path) -> None:
    source = rec_source(str(write(tmp_path / "x.parquet", [row("q", encoded(photo(), "PNG"), ["a"])])), None)
    task = refcoco.make_task(source, None, "short", "pixel", 2, 8)
    scored = task.score("[8, 8, 32, 24]", next(task.docs(0)))
    assert scored["parsed"] == (8, 8, 32, 24)
    assert scored["box"] == (8 / 96, 8 / 64, 32 / 96, 24 / 64)
    assert scored["metrics"]["refcoco_IoU"] == pytest.approx(1, abs=1e-6)


def test_real_data_gets_the_references_answer_length(tmp_path: Path, stub: StubModel) -> None:
    file = write(tmp_path / "x.parquet", [row("q", encoded(photo(), "JPEG"), ["a"])])
    run("--data", file, "--method", "none", limit=None)
    assert stub.max_new_tokens == {1024}


def test_no_resized_metrics_where_the_model_answers_in_fractions(tmp_path: Path) -> None:
    run("--coord-format", "pixel", "--out", tmp_path)
    assert list(summary(tmp_path)["runs"]["full"]["metrics"]) == list(REC_METRICS)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--limit", "0"], "argument --limit: '0' is no whole number from 1 on"),
        (["--limit", "-3"], "--limit"),
        (["--batch-size", "0"], "argument --batch-size: '0' is no whole number from 1 on"),
        (["--max-new-tokens", "1000000000"], "is too long an answer, the largest possible is 32768"),
        (["--budget", "many"], "'many' is neither 192, 128, 64 nor a share"),
        (["--budget", "1/0"], "'1/0' is neither"),
        (["--budget", "256"], "budget is 256"),
        (["--budget", "0.001"], "leaves fewer than one of 64 visual tokens"),
        (["--budget", "0.9"], "method 'nuwa' averages at most 4/7"),
        (["--method", "pdrop", "--budget", "0.02"], "is not feasible"),
        (["--method", "prune"], "invalid choice: 'prune'"),
        (["--split", "testA"], "testA"),
        (["--data", "nowhere"], "no file or folder nowhere for --data"),
        (["--decisions", "each"], "expected 'every' or 'every:K'"),
        (["--method", "fastv", "--variant", "flat"], "method 'fastv' has no use for variant='flat'"),
        (["--method", "none", "--decisions", "every"], "method 'none' has no use for decisions"),
        (["--controls"], "--controls adds runs to a comparison"),
        (["--compare", "--action", "delete"], "--compare runs both actions"),
        (["--compare", "--method", "pool"], "--compare needs a method that deletes and reroutes"),
        (["--preset", "llava15_fastv_K3_avg64", "--budget", "64"], "leave out --budget"),
        (["--preset", "llava15_fastv_K3_avg64", "--compare"], "leave out --compare"),
        (["--preset", "llava15_fastv_K3_avg64"], "is for 32 decoder layers and the model has 12"),
        (["--preset", "nonsense"], "preset is 'nonsense', expected one of"),
        (["--jpeg-roundtrips", "1"], "invalid choice: 1"),
    ],
)
def test_bad_input_gives_one_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture) -> None:
    assert expected in refusal(capsys, *arguments)


def test_corrupt_image_gives_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    broken = encoded(photo(), "JPEG")[:300]
    file = write(tmp_path / "x.parquet", [row("q0", encoded(photo(), "JPEG"), ["a"]), row("q1", broken, ["b"])])
    capsys.readouterr()
    run("--data", file, "--batch-size", 1, limit=None, code=2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ")
    assert "question_id q1: the image cannot be decoded" in lines[-1]


def test_absent_embedded_model_says_how_to_make_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("convert.embedded.CHECKPOINTS", tmp_path)
    assert CHECKPOINTS.parts[-3:] == ("evals", "scenes", "checkpoints")
    with pytest.raises(
        ValueError, match=r"scenes-llava-bypass is not at .*make it with `python -m evals\.scenes\.train`"
    ):
        load_model("scenes-llava-bypass", None)


def test_bypass_model_carries_its_caveat(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run("--model", "scenes-llava-bypass", "--out", tmp_path)
    assert "no evidence for a training-free claim" in summary(tmp_path)["caveat"]
    assert "no evidence for a training-free claim" in capsys.readouterr().out


def test_vqa_reports_each_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stub: StubModel, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(stub, "_answer", lambda image, prompt, label: " Yes ")
    assert scenes_vqa.main(["--limit", "12", "--out", str(tmp_path)]) == 0
    metrics = summary(tmp_path)["runs"]["full"]["metrics"]
    assert metrics["exact_match_yesno"] == 0.5
    assert metrics["exact_match_colour"] == metrics["exact_match_count"] == 0
    assert metrics["exact_match"] == pytest.approx(2 / 12)
    assert "exact_match_colour" in capsys.readouterr().out
    assert all(prompt.endswith("\nAnswer the question using a single word or phrase.") for prompt in stub.prompts)


def test_vqa_leaves_out_kinds_that_were_not_asked(tmp_path: Path) -> None:
    assert scenes_vqa.main(["--limit", "2", "--out", str(tmp_path)]) == 0
    assert list(summary(tmp_path)["runs"]["full"]["metrics"]) == [
        "exact_match",
        "exact_match_yesno",
        "exact_match_colour",
    ]


def test_vqa_refuses_an_unknown_split(capsys: pytest.CaptureFixture) -> None:
    assert scenes_vqa.main(["--split", "dev"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
