"""`evals.show`: questions asked now, questions of a run folder, and what is refused. No model runs."""

import io
import json
import re
from base64 import b64decode
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from evals import refcoco, show
from evals.harness import cli
from evals.harness.data import Doc
from reroute_jax.engine.trace import Seen, Trace
from reroute_jax.models import FAMILIES
from reroute_jax.routing.cost import kv_width
from tests.evals.stub import StubModel


class TracedStub(StubModel):
    """Keeps the first tokens of each decision. Its image processor is a LLaVA one of the embedded model's size."""

    family = FAMILIES["llava"]

    def __init__(self) -> None:
        super().__init__()
        side = self.config.vision.image_size
        crop = {"width": side, "height": side}
        self.image_processor = SimpleNamespace(size={"shortest_edge": side}, crop_size=crop)

    def answer(self, questions, *, schedule, trace=False, **how):
        found = super().answer(questions, schedule=schedule, **how)
        traces = [self._trace(image, schedule) if trace else None for image, _ in questions]
        return [replace(one, trace=its) for one, its in zip(found, traces, strict=True)]

    def _trace(self, image, schedule):
        grid, side = self.config.vision.grid, self.config.vision.image_size
        pixels = np.asarray(image.resize((side, side)))
        count = grid[0] * grid[1]
        kept = schedule.keep_counts([count])[:, 0]
        selected = tuple(np.arange(keep)[None] for keep in kept)
        scores = tuple(np.linspace(1, 0, count, dtype=np.float32)[None] for _ in kept)
        tokens = [5] * self.config.num_layers
        for stage, keep in zip(schedule.decisions, kept, strict=True):
            tokens[stage.lo : stage.hi] = [keep + 5] * (stage.hi - stage.lo)
        seen = Seen(schedule, ((grid,),), lambda: [pixels], self.config, "float32")
        return Trace(selected, scores, None, np.array([tokens]), seen)


@pytest.fixture
def stub(monkeypatch):
    model = TracedStub()
    for module in (refcoco, show, cli):
        monkeypatch.setattr(module, "load_model", lambda *_, **options: model)
    return model


def shown(folder) -> str:
    return (folder / "index.html").read_text(encoding="utf-8")


def articles(html: str) -> list[str]:
    return re.findall(r'<article[^>]* id="q0-(\d+)"', html)


def test_questions_are_asked_and_shown(stub, tmp_path, capsys):
    assert show.main(["--compare", "--method", "pdrop", "--index", "4,1", "--out", str(tmp_path)]) == 0
    html = shown(tmp_path)
    assert sorted(articles(html)) == ["1", "4"]
    assert "2 questions" in capsys.readouterr().out
    for text in ("all tokens", "pdrop-delete-128", "pdrop-reroute-128", "reroute right and deletion wrong"):
        assert text in html
    first = next(iter(re.findall(r'href="data:image/png;base64,([^"]+)"', html)))
    side = stub.config.vision.image_size
    assert Image.open(io.BytesIO(b64decode(first))).size == (side, side)


def test_a_run_folder_is_shown_with_its_own_answers(stub, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    assert refcoco.main(["--compare", "--method", "pdrop", "--limit", "6", "--out", str(run)]) == 0
    assert show.main(["--run", str(run), "--limit", "2", "--out", str(out)]) == 0
    html = shown(out)
    assert len(articles(html)) == 2
    assert html.count('data-number="') == 6
    for line in (run / "pdrop-reroute-128.jsonl").read_text().splitlines():
        assert json.loads(line)["text"] in html


def test_a_folder_whose_data_changed_is_refused(stub, tmp_path, capsys):
    run = tmp_path / "run"
    assert refcoco.main(["--method", "pdrop", "--limit", "2", "--out", str(run)]) == 0
    file = run / "full.jsonl"
    file.write_text(file.read_text().replace("Please provide", "Please give"))
    assert show.main(["--run", str(run), "--out", str(tmp_path / "out")]) == 2
    assert "is not that of scenes [test] any more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--index", "1", "--limit", "2"], "--index names the questions and --limit counts them"),
        (["--index", "999999", "--limit-less"], "unrecognized arguments"),
        (["--run", "nowhere"], "nowhere is no folder of one finished run"),
        (["--run", "nowhere", "--budget", "64"], "leave out --budget"),
        (["--run", "nowhere", "--fresh"], "evals.show keeps no answers: leave out --fresh"),
        (["--batch-size", "8"], "evals.show asks one question at a time: leave out --batch-size"),
    ],
)
def test_what_cannot_be_shown_is_refused(stub, arguments, message, capsys, tmp_path):
    try:
        code = show.main([*arguments, "--out", str(tmp_path)])
    except SystemExit as left:
        code = left.code
    assert code == 2
    assert message in capsys.readouterr().err


def doc_of(size: tuple[int, int], given: tuple[int, int]) -> Doc:
    return Doc(0, "0", Image.new("RGB", given), size, "", None)


def test_a_true_box_moves_with_the_crop(stub):
    """640 x 480 becomes 448 x 336, of which 56 columns are cut off on either side."""
    processor = SimpleNamespace(size={"shortest_edge": 336}, crop_size={"width": 336, "height": 336})
    seen = FAMILIES["llava"].seen_part((640, 480), processor)
    np.testing.assert_allclose(seen, (0.125, 0.0, 0.875, 1.0))
    box = show._true_box((0.125, 0.25, 0.5, 1.0), doc_of((640, 480), (640, 480)), seen)
    np.testing.assert_allclose(box, (0.0, 0.25, 0.5, 1.0))


def test_a_true_box_moves_with_the_padding(stub):
    """640 x 480 in the middle of a square of 640: 80 rows above and below."""
    box = show._true_box((0.0, 0.0, 1.0, 0.5), doc_of((640, 480), (640, 640)), (0.0, 0.0, 1.0, 1.0))
    np.testing.assert_allclose(box, (0.0, 0.125, 1.0, 0.5))


def test_qwen_sees_the_whole_image():
    assert FAMILIES["qwen2_5_vl"].seen_part((1000, 300), None) == (0.0, 0.0, 1.0, 1.0)


def test_kv_bytes_are_those_of_the_cache(stub):
    schedule = stub.plan("pdrop", budget=128, action="reroute")
    image = Image.new("RGB", (64, 64))
    trace = stub.answer([(image, "where ?")], schedule=schedule, trace=True, max_new_tokens=1)[0].trace
    assert trace.routed().kv_bytes == 2 * 4 * kv_width(stub.config.decoder) * int(trace.kv_tokens.sum())
