"""LLaVA's own evaluation as an opt-in: square images and a system sentence."""

import io
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from convert.embedded import CHECKPOINTS
from convert.loading import load
from evals import refcoco
from evals.harness import vqa
from evals.harness.padding import from_square, mean_colour, square
from evals.pope import BENCHMARK
from evals.scenes.spec import model_config
from reroute_jax import RerouteError
from reroute_jax.models.llava import VICUNA_SYSTEM
from tests.evals.stub import QwenStub


def test_an_image_stands_in_the_middle_of_its_square():
    shown = np.asarray(square(Image.new("RGB", (5, 2), (9, 9, 9)), (1, 2, 3)))
    assert shown.shape == (5, 5, 3)
    np.testing.assert_array_equal(shown[1:3], np.full((2, 5, 3), 9))
    np.testing.assert_array_equal(shown[[0, 3, 4]], np.broadcast_to([1, 2, 3], (3, 5, 3)))
    assert mean_colour([0.48145466, 0.4578275, 0.40821073]) == (122, 116, 104)  # CLIP's


@pytest.mark.parametrize(("size", "box"), [((640, 480), (0.25, 0.25, 0.5, 0.5)), ((300, 400), (0.125, 0, 0.875, 1))])
def test_boxes_come_back(size, box):
    side, (width, height) = max(size), size
    left, top = (side - width) // 2, (side - height) // 2
    x1, y1, x2, y2 = (value * side for value in box)
    found = from_square(box, size)
    np.testing.assert_allclose(
        found, ((x1 - left) / width, (y1 - top) / height, (x2 - left) / width, (y2 - top) / height)
    )
    assert box[0] != 0.125 or found == (0, 0, 1, 1)


@pytest.fixture
def tall(tmp_path):
    """A parquet file with one image of 40 x 80 pixels and one object."""
    saved = io.BytesIO()
    Image.new("RGB", (40, 80), (200, 0, 0)).save(saved, "PNG")
    row = {
        "question_id": "1",
        "image": {"bytes": saved.getvalue(), "path": None},
        "answer": ["red"],
        "bbox": [0.0, 0.0, 40.0, 40.0],
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "val.parquet")
    return tmp_path / "val.parquet"


@pytest.mark.parametrize(("mode", "right"), [("pad", 1.0), ("crop", 0.0)])
def test_grounding_with_padded_images(tall, mode, right):
    model = SimpleNamespace(config=model_config(), image_processor=SimpleNamespace(image_mean=(0.5, 0.5, 0.5)))
    args = refcoco.parser().parse_args(["--data", str(tall), "--llava-image-mode", mode])
    task, _, _ = refcoco.questions(args, refcoco.rec_source(str(tall), None), model)
    (doc,) = task.docs(0)
    assert doc.size == (40, 80) and (doc.image.size == (80, 80)) == (mode == "pad")
    answer = "[0.25, 0, 0.75, 0.5]"  # of the square
    assert task.score(answer, doc)["metrics"]["refcoco_ACC@0.9"] == right


def test_other_families_are_refused():
    args = vqa.parser(BENCHMARK).parse_args(["--llava-image-mode", "pad"])
    with pytest.raises(RerouteError, match="is for LLaVA"):
        vqa.questions(BENCHMARK, args, vqa.row_source(BENCHMARK, "scenes", None), QwenStub([]))


def test_the_system_sentence_opens_the_prompt():
    plain, told = (load(CHECKPOINTS / "scenes-llava", "float32", vicuna_system=system) for system in (False, True))
    grids = [plain.config.vision.grid]
    sentence = told.tokenizer(VICUNA_SYSTEM, add_special_tokens=False)["input_ids"]
    without, found = plain.prompt_ids("where is it", grids), told.prompt_ids("where is it", grids)
    assert sentence and found.tolist() == [without[0], *sentence, *without[1:]]
    with pytest.raises(RerouteError, match="vicuna_system is for llava, this model is qwen2_5_vl"):
        load(CHECKPOINTS / "scenes-qwen", vicuna_system=True)
