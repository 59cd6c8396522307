"""The grounding benchmark with a model of Qwen2.5-VL's family: its prompt, frame, scenes and costs."""

import json
from pathlib import Path

import numpy as np
import pytest

from evals import refcoco, scenes_vqa
from evals.harness import vqa
from evals.harness.boxes import REC_METRICS, RESIZED
from evals.harness.data import Doc, rec_docs, rec_source
from reroute_jax.routing.cost import account
from tests.evals.harness.test_data import encoded, photo, row, write
from tests.evals.stub import NUWA_END, QwenStub
from tests.evals.test_refcoco import QUESTIONS, run, summary

QWEN = ("--model", "scenes-qwen")


@pytest.fixture
def qwen(monkeypatch: pytest.MonkeyPatch) -> tuple[QwenStub, list[Doc]]:
    docs = list(rec_docs(rec_source("scenes", None, "qwen2_5_vl"), 0, QUESTIONS, 2))
    model = QwenStub(docs)
    monkeypatch.setattr(refcoco, "load_model", lambda *arguments, **options: model)
    return model, docs


def test_qwen_takes_its_own_prompt_format_and_scenes(
    tmp_path: Path, qwen: tuple[QwenStub, list[Doc]], capsys: pytest.CaptureFixture
) -> None:
    model, docs = qwen
    assert len({doc.size for doc in docs}) > 3
    run(*QWEN, "--out", tmp_path)
    expected = [f"Locate {doc.text} in this image and output the bbox coordinates in JSON format." for doc in docs]
    assert sorted(model.prompts) == sorted(expected * 2)
    found = summary(tmp_path)
    settings = found["settings"]
    wanted = {
        "prompt_style": "nuwa",
        "coord_format": "pixel",
        "coord_frame": "original",
        "repetition_penalty": 1.05,
        "image_resizes": 2,
        "pixel_limits": [9408, 15680],
        "mrope_compat": None,
    }
    assert {name: settings[name] for name in wanted} == wanted
    assert "llava_image_mode" not in settings
    full, routed = found["runs"].values()
    resized = [name + RESIZED for name in REC_METRICS]
    assert list(full["metrics"]) == list(routed["retention_percent"]) == [*REC_METRICS, *resized]
    # Its answers are right in the frame it sees, which the reference does not undo.
    assert full["metrics"]["refcoco_IoU_resized"] > 0.98
    assert full["metrics"]["refcoco_ACC@0.9_resized"] == 1
    assert full["metrics"]["refcoco_IoU"] < 0.5
    table = capsys.readouterr().out
    assert [line.split()[1] for line in table.splitlines() if line.startswith("mean ")] == ["IoU", "IoU"]
    halves = table.split("cost per question")[0].split("that the model saw")
    for half, names in zip(halves, (REC_METRICS, resized), strict=True):
        lines = [line.split() for line in half.splitlines() if line.startswith(("full ", "nuwa"))]
        rows = {line[0]: line[1:] for line in lines if not line[1].endswith("%")}  # shares of answers aside
        means = [f"{full['metrics'][name]:.4f}" for name in names]
        kept = [routed["retention_percent"][name]["value"] for name in names]
        assert rows["full"] == means
        assert rows["nuwa-reroute-128"] == ["n/a" if value is None else f"{value:.1f}" for value in kept]
    lines = [json.loads(line) for line in (tmp_path / "full.jsonl").read_text().splitlines()]
    for line, doc in zip(lines, docs, strict=True):
        assert line["model_size"] == [2 * side for side in doc.size]
        assert line["box_resized"] == pytest.approx([side / 2 for side in line["box"]])


def test_cost_is_averaged_over_images_of_varying_size(tmp_path: Path, qwen: tuple[QwenStub, list[Doc]]) -> None:
    model, docs = qwen
    run(*QWEN, "--method", "pdrop", "--budget", "64", "--out", tmp_path)
    full, routed = (values["cost"] for values in summary(tmp_path)["runs"].values())
    grids = [(doc.size[1] // 14, doc.size[0] // 14) for doc in docs]
    assert full["visual_tokens"] == full["average_visual_tokens"] == pytest.approx(np.mean([r * c for r, c in grids]))
    texts = [4 + len(f"Locate {doc.text}{NUWA_END}".split()) for doc in docs]
    one_each = [
        account(
            model.plan("pdrop", budget=64), model.config.decoder, visual=g[0] * g[1], text=t, grid=g, dtype="float32"
        )
        for g, t in zip(grids, texts, strict=True)
    ]
    assert routed["average_visual_tokens"] == pytest.approx(np.mean([one.average for one in one_each]))
    assert routed["kv_bytes"] == pytest.approx(np.mean([one.kv_bytes for one in one_each]))
    assert routed["prompt_gqa"] == pytest.approx(np.mean([one.prompt.gqa for one in one_each]))


def test_real_data_gets_the_references_answer_length_for_qwen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "x.parquet", [row("q", encoded(photo(), "PNG"), ["a"])])
    model = QwenStub(list(rec_docs(rec_source(str(file), None), 0, 1, 2)))
    monkeypatch.setattr(refcoco, "load_model", lambda *arguments, **options: model)
    run("--data", file, "--method", "none", limit=None)
    assert model.max_new_tokens == {128}


def test_the_frame_the_model_saw_counts_beside_the_stored_one(tmp_path: Path) -> None:
    """The specification's 500 x 375 image, seen at 532 x 392: a right answer loses the strict thresholds."""
    stored = row("q", encoded(photo(500, 375), "PNG"), ["a"], [100.0, 75.0, 200.0, 150.0])
    source = rec_source(str(write(tmp_path / "x.parquet", [stored])), None)
    task = refcoco.make_task(source, None, "nuwa", "pixel", 2, 8, lambda image: (532, 392))
    scored = task.score('[{"bbox_2d": [106.4, 78.4, 319.2, 235.2], "label": "a"}]', next(task.docs(0)))
    assert scored["box_resized"] == pytest.approx((0.2, 0.2, 0.6, 0.6))
    assert scored["box"] == pytest.approx((106.4 / 500, 78.4 / 375, 319.2 / 500, 235.2 / 375))
    assert scored["metrics"]["refcoco_IoU_resized"] == pytest.approx(1, abs=1e-6)
    assert scored["metrics"]["refcoco_ACC@0.7"] == 1
    assert scored["metrics"]["refcoco_ACC@0.9"] == 0
    assert scored["metrics"]["refcoco_ACC@0.9_resized"] == 1


def test_vqa_asks_about_the_familys_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = QwenStub([])
    sizes = set()
    monkeypatch.setattr(model, "_answer", lambda image, prompt, label: sizes.add(image.size) or "yes")
    monkeypatch.setattr(vqa, "load_model", lambda *arguments, **options: model)
    assert scenes_vqa.main([*QWEN, "--limit", "12", "--out", str(tmp_path)]) == 0
    assert len(sizes) > 3
