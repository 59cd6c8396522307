"""Each benchmark's command from its data to its report, on a model that answers at once."""

import json
import random
import zlib
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evals import gqa, mmbench, mme, pope, refcoco, refcocog, refcocoplus, scenes_vqa, scienceqa, textvqa, vqav2
from evals.harness import vqa
from evals.scenes.data import refcoco_rows
from tests.evals.harness.test_data import encoded
from tests.evals.stub import StubModel

QUESTIONS = 6
WORDS = ("yes", "Yes ", "No", "no", "Yes.", "A", "B. red", "c", "red", "blue", "2", "I see no such thing.")
GROUNDING = {"refcoco": refcoco, "refcocoplus": refcocoplus, "refcocog": refcocog}
BY_ROW = {"gqa": gqa, "mmbench": mmbench, "mme": mme, "pope": pope, "scienceqa": scienceqa}
BY_ROW |= {"textvqa": textvqa, "vqav2": vqav2}
COMMANDS = {**GROUNDING, **BY_ROW, "scenes_vqa": scenes_vqa}
REC_COLUMNS = "question_id image question answer segmentation bbox iscrowd file_name"
STAND_IN_COLUMNS = {
    "gqa": "id imageId question answer image",
    "mmbench": "index question hint answer A B C D category image source L2-category comment split",
    "mme": "question_id image question answer category",
    "pope": "id question_id question answer image_source image category",
    "scienceqa": "image question choices answer hint task grade subject topic category skill lecture solution",
    "textvqa": "image_id question_id question question_tokens image image_width image_height flickr_original_url "
    "flickr_300k_url answers image_classes set_name ocr_tokens",
    "vqav2": "question_type multiple_choice_answer answers image_id answer_type question_id question image",
}
NEW_TOKENS = {"gqa": 16, "mmbench": 1024, "mme": 16, "pope": 128, "scienceqa": 16, "textvqa": 1024, "vqav2": 16}


class Talker(StubModel):
    """Boxes to those who ask for them, words to others."""

    words = WORDS

    def _answer(self, image, prompt: str, label: str) -> str:
        if "bounding box" in prompt:
            return super()._answer(image, prompt, label)
        return random.Random(zlib.crc32(image.tobytes() + prompt.encode() + label.encode())).choice(self.words)


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Talker:
    model = Talker()
    for module in (refcoco, vqa):
        monkeypatch.setattr(module, "load_model", lambda *arguments, **options: model)
    monkeypatch.chdir(tmp_path)
    return model


def run(name: str, *arguments: object, code: int = 0, limit: int | None = QUESTIONS) -> None:
    limited = [] if limit is None else ["--limit", str(limit)]
    assert COMMANDS[name].main([*map(str, arguments), *limited]) == code


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def lines(folder: Path, run_name: str = "full") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{run_name}.jsonl").read_text().splitlines()]


@cache
def stand_in(name: str) -> list[dict[str, Any]]:
    rows = refcoco_rows("test", 9) if name in GROUNDING else BY_ROW[name].BENCHMARK.stand_in("test", "llava")
    return [dict(row) for row in islice(rows, QUESTIONS)]


def write_parquet(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows with PIL images as the hub stores them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    stored = [
        row | {"image": {"bytes": encoded(row["image"], "PNG"), "path": None}} if "image" in row else row
        for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(stored), file)
    return file


def write_lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines, their images beside them."""
    (file.parent / "images").mkdir(parents=True, exist_ok=True)
    with open(file, "w") as out:
        for number, row in enumerate(rows):
            path = f"images/{number}.png"
            row["image"].save(file.parent / path)
            out.write(json.dumps(row | {"image": path}) + "\n")
    return file


@pytest.mark.parametrize("name", COMMANDS)
def test_stand_in_from_end_to_end(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(name, "--out", tmp_path)
    found = summary(tmp_path)
    assert found["settings"]["task"] == name
    assert found["settings"]["data"] == "scenes [test]"
    assert found["questions"] == QUESTIONS
    for values in found["runs"].values():
        assert values["metrics"]
        assert np.isfinite(list(values["metrics"].values())).all()
    table = capsys.readouterr().out
    assert all(metric.removeprefix("refcoco_") in table for metric in found["runs"]["full"]["metrics"])
    assert {line["task"] for line in lines(tmp_path)} == {name}


@pytest.mark.parametrize("name", STAND_IN_COLUMNS)
def test_stand_ins_have_the_hubs_columns(name: str) -> None:
    assert set(stand_in(name)[0]) == set(STAND_IN_COLUMNS[name].split())
    assert set(stand_in("refcoco")[0]) == set(REC_COLUMNS.split())


@pytest.mark.parametrize("name", [*GROUNDING, *BY_ROW])
@pytest.mark.parametrize("write", [write_parquet, write_lines])
def test_local_data_give_the_lines_of_the_stand_in(name: str, write: Any, tmp_path: Path, stub: Talker) -> None:
    file = write(tmp_path / "data" / ("x.jsonl" if write is write_lines else "x.parquet"), stand_in(name))
    run(name, "--method", "none", "--out", tmp_path / "there")
    stub.max_new_tokens.clear()
    run(name, "--method", "none", "--out", tmp_path / "here", "--data", file)
    assert (tmp_path / "here" / "full.jsonl").read_bytes() == (tmp_path / "there" / "full.jsonl").read_bytes()
    assert summary(tmp_path / "here")["settings"]["data"] == str(file)
    assert stub.max_new_tokens == {NEW_TOKENS.get(name, 1024)}  # the reference's, on data that are no stand-in


@pytest.fixture
def gqa_folder(tmp_path: Path) -> Path:
    """GQA in the hub's layout: images in a config of their own, each asked about twice."""
    rows = stand_in("gqa")
    questions = [
        {key: row[key] for key in ("question", "answer")} | {"id": f"q{i}", "imageId": f"n{i // 2}"}
        for i, row in enumerate(rows)
    ]
    images = [{"id": f"n{i}", "image": rows[i]["image"]} for i in (2, 0, 1)]
    folder = tmp_path / "gqa"
    write_parquet(folder / gqa.HUB.config / "testdev-00000-of-00001.parquet", questions)
    write_parquet(folder / gqa.HUB.images.config / "testdev-00000-of-00001.parquet", images)
    return folder


def test_gqa_joins_images_on_their_id(gqa_folder: Path, tmp_path: Path, stub: Talker) -> None:
    run("gqa", "--data", gqa_folder, "--out", tmp_path / "o", "--method", "none")
    found = lines(tmp_path / "o")
    assert [line["question_id"] for line in found] == [f"q{i}" for i in range(6)]
    assert [line["cluster"] for line in found] == ["n0", "n0", "n1", "n1", "n2", "n2"]
    for number, line in enumerate(found):
        image = stand_in("gqa")[number // 2]["image"]
        assert line["text"] == stub._answer(image, line["prompt"], "none")


def test_gqa_question_without_its_image_is_named(gqa_folder: Path, capsys: pytest.CaptureFixture) -> None:
    file = gqa_folder / gqa.HUB.images.config / "testdev-00000-of-00001.parquet"
    pq.write_table(pq.read_table(file).slice(0, 2), file)
    run("gqa", "--data", gqa_folder, code=2)
    assert "has no image 'n1', which" in capsys.readouterr().err


def test_limit_takes_the_first_questions(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "x.parquet", stand_in("pope"))
    run("pope", "--data", file, "--limit", 4, "--out", tmp_path / "o", "--method", "none", limit=None)
    assert [line["question_id"] for line in lines(tmp_path / "o")] == ["0", "1", "2", "3"]


def test_report_says_what_was_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run("pope", "--method", "pdrop", "--budget", "64", "--seed", "3", "--out", tmp_path)
    found = summary(tmp_path)
    head = dict(line.split("  ", 1) for line in capsys.readouterr().out.split("\n\n")[0].splitlines())
    assert list(head) == ["task", "model", "plan", "switches", "versions", "seed"]
    table = {title: text.strip() for title, text in head.items()}
    assert table["task"] == f"pope, {QUESTIONS} questions of scenes [test]"
    assert table["model"] == "scenes-llava, float32"
    cost = found["runs"]["pdrop-reroute-64"]["cost"]
    assert cost["realised_budget"] == cost["average_visual_tokens"] / cost["visual_tokens"]
    layers = ", ".join(str(stage["lo"]) for stage in found["settings"]["runs"]["pdrop-reroute-64"]["stages"][1:])
    average = f"{cost['average_visual_tokens']:.2f} of 64.00 visual tokens a layer ({cost['realised_budget']:.1%})"
    assert table["plan"] == f"pdrop-reroute-64: decides at layers {layers}, {average}"
    for switch in ("image_backend pil", "repetition_penalty 1.0", "llava_image_mode crop", "max_new_tokens 16"):
        assert switch in table["switches"]
    assert f"jax {found['versions']['jax']}" in table["versions"]
    assert table["seed"] == "3"


def broken(rows: list[dict[str, Any]], number: int, file: Path) -> Path:
    """JSON lines of which one has an image cut off."""
    write_lines(file, rows)
    image = file.parent / "images" / f"{number}.png"
    image.write_bytes(image.read_bytes()[:100])
    return file


def test_a_bad_image_stops_the_run_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = stand_in("mme")
    file = broken(rows, 2, tmp_path / "x.jsonl")
    run("mme", "--data", file, code=2)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {file}, question_id {rows[2]['question_id']}, image {file.parent / 'images'}/")
    assert ": the image cannot be decoded" in said
    assert said.endswith("repair it or give --skip-bad")


def test_skip_bad_counts_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = stand_in("mme")
    file, out = broken(rows, 2, tmp_path / "x.jsonl"), tmp_path / "o"
    run("mme", "--data", file, "--out", out, code=2)
    run("mme", "--data", file, "--out", out, "--skip-bad")  # goes on where the run stopped
    found, bad = summary(out), rows[2]["question_id"]
    assert found["questions"] == QUESTIONS - 2
    assert found["left_out"] == {"bad image": [bad], "incomplete": [bad]}
    table = capsys.readouterr().out
    assert f"Left out, bad image: 1 (question_id {bad})" in table
    assert f"Left out, incomplete: 1 (question_id {bad})" in table
    assert "cannot be decoded" in lines(out)[2]["why"]
    run("mme", "--out", tmp_path / "whole")
    assert lines(out)[3:] == lines(tmp_path / "whole")[3:]


def test_skip_bad_leaves_every_expression_of_an_object_out(tmp_path: Path) -> None:
    rows = stand_in("refcoco")
    file = broken(rows, 1, tmp_path / "x.jsonl")
    run("refcoco", "--data", file, "--out", tmp_path / "o", "--skip-bad", limit=None)
    found = summary(tmp_path / "o")
    assert found["left_out"] == {"bad image": [rows[1]["question_id"]] * len(rows[1]["answer"])}
    scored = [line["metrics"]["refcoco_IoU"] for line in lines(tmp_path / "o") if line["metrics"]]
    assert len(scored) == found["questions"] == sum(len(row["answer"]) for row in rows) - len(rows[1]["answer"])
    assert found["runs"]["full"]["metrics"]["refcoco_IoU"] == pytest.approx(np.mean(scored))


def test_nothing_but_bad_images_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = broken(stand_in("pope")[:1], 0, tmp_path / "x.jsonl")
    run("pope", "--data", file, "--skip-bad", code=2)
    assert "no question of pope can be scored: all are left out (bad image)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "changed", "expected"),
    [
        ("refcoco", {"answer": "left man"}, "row 0: answer is 'left man', expected a list of strings"),
        ("refcoco", {"bbox": [1, 2, "x", 4]}, "question_id test_0: bbox is [1, 2, 'x'"),
        ("textvqa", {"answers": "stop"}, "question_id 0: answers is 'stop', expected list"),
        ("textvqa", {"answers": [1] * 10}, "question 0: the row has contents of a wrong type"),
        ("vqav2", {"answers": ["stop"]}, "question 0: the row has contents of a wrong type"),
        ("gqa", {"question": None}, "id test_0: question is None, expected str"),
        ("mme", {"answer": "Perhaps"}, "answer is 'Perhaps', expected Yes or No"),
        ("mmbench", {"answer": "F"}, "index 0: answer is 'F', expected one of A, B, C, D"),
        ("scienceqa", {"answer": 40}, "question 0: answer is 40, expected the place of one of"),
        ("pope", {"image": None}, "line 1 of"),
    ],
)
def test_rows_that_cannot_be_asked_are_named(
    name: str, changed: dict[str, Any], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = write_lines(tmp_path / "x.jsonl", stand_in(name))
    first, *rest = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps(json.loads(first) | changed), *rest]) + "\n")
    run(name, "--data", file, code=2)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    assert expected in said


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{oops\n", "line 1 of x.jsonl is not JSON"),
        ("[1]\n", "line 1 of x.jsonl is no object: expected JSON that begins with {"),
        ('{"id": "1"}\n', "line 1 of x.jsonl lacks the columns question, answer, image_source, image: it has id"),
        ('{"id": "caf\xe9"}\n', "line 1 of x.jsonl is not UTF-8 (byte 0xe9 at 11)"),
        ("\n", "x.jsonl holds no question, expected at least one row"),
    ],
)
def test_json_lines_that_are_none_are_refused(
    content: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "x.jsonl").write_text(content, encoding="latin-1")
    run("pope", "--data", "x.jsonl", code=2)
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gqa", "scienceqa", "textvqa", "vqav2"])
def test_exact_match_is_the_mean_of_the_lines(name: str, tmp_path: Path) -> None:
    run(name, "--out", tmp_path, limit=40)
    for run_name, values in summary(tmp_path)["runs"].items():
        scores = [line["metrics"]["exact_match"] for line in lines(tmp_path, run_name)]
        assert values["metrics"] == {"exact_match": pytest.approx(sum(scores) / 40)}
        assert 0 < sum(scores) < 40


def test_derived_metrics_come_with_retention_and_differences(tmp_path: Path, stub: Talker) -> None:
    stub.words = ("yes", "no", "Yes.")
    run("pope", "--compare", "--out", tmp_path, limit=80)
    found = summary(tmp_path)
    full, delete, reroute = found["runs"].values()

    def f1(run_name: str) -> float:
        pairs = [(line["text"].strip().lower(), line["truth"]) for line in lines(tmp_path, run_name)]
        right, wrong, missed = (pairs.count(pair) for pair in (("yes", "yes"), ("yes", "no"), ("no", "yes")))
        return 2 * right / (2 * right + wrong + missed)

    scores = [f1(name) for name in found["runs"]]
    assert [values["metrics"]["pope_f1_score"] for values in (full, delete, reroute)] == pytest.approx(scores)
    kept = reroute["retention_percent"]["pope_f1_score"]
    assert kept["value"] == pytest.approx(100 * scores[2] / scores[0])
    assert kept["low"] < kept["value"] < kept["high"]
    (delta,) = found["differences"].values()
    assert delta["pope_f1_score"]["value"] == pytest.approx(scores[2] - scores[1])
    assert not any(name.startswith("_") for name in full["metrics"])


SPLITS = {"refcoco": ("val", "test", "testA", "testB"), "refcocoplus": ("val", "testA", "testB")}
SPLITS |= {"refcocog": ("val", "test")}


@pytest.mark.parametrize(("name", "splits"), SPLITS.items())
def test_every_split_of_a_folder_in_the_hubs_layout(name: str, splits: tuple[str, ...], tmp_path: Path) -> None:
    for number, split in enumerate(splits):
        write_parquet(tmp_path / "d" / "data" / f"{split}-00000-of-00001.parquet", stand_in(name)[number : number + 1])
    for number, split in enumerate(splits):
        run(name, "--data", tmp_path / "d", "--split", split, "--out", tmp_path / split, "--method", "none", limit=None)
        assert {line["question_id"] for line in lines(tmp_path / split)} == {stand_in(name)[number]["question_id"]}
    run(name, "--data", tmp_path / "d", "--out", tmp_path / "default", "--method", "none", limit=None)
    assert summary(tmp_path / "default")["settings"]["data"].endswith("[val]")
