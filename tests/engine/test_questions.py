"""Questions that wait for their batch: what they hold, and that nothing is lost by it. No model runs."""

import pickle

import numpy as np
import pytest
from PIL import Image

import reroute_jax
from reroute_jax.engine.batching import lay_out
from reroute_jax.engine.groups import batch_of
from reroute_jax.engine.images import open_image
from reroute_jax.errors import RerouteError
from reroute_jax.routing.plan import Schedule
from tests.checkpoints import qwen_pair, small, smallest

MODELS = {"llava": small, "qwen2_5_vl": lambda: qwen_pair()[1]}


def photo(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("size", [(1200, 900), (64, 64)])
def test_a_question_holds_three_bytes_a_pixel_of_the_models_size(family, size, tmp_path):
    """Whatever the size of the file. Ids are 8 bytes each."""
    model = MODELS[family]()
    photo(*size).save(tmp_path / "photo.png")
    question = model.question((tmp_path / "photo.png", "what is this ?"))
    width, height = model.model_size(photo(*size))
    assert len(pickle.dumps(question)) <= 3 * width * height + 8 * len(question.ids) + 1000
    buffers = [image if image.base is None else image.base for image in question.images]
    assert all(memoryview(buffer).nbytes == 3 * width * height for buffer in buffers)


@pytest.mark.parametrize("family", MODELS)
def test_an_image_that_was_fitted_before_is_neither_opened_nor_resized_again(family, tmp_path):
    model, path = MODELS[family](), tmp_path / "photo.png"
    photo(150, 90).save(path)
    wanted = model.question((path, "what is this ?"))
    fitted = model.image(path)
    path.unlink()
    for item in ((fitted, "what is this ?"), [("user", [fitted, "what is this ?"])]):
        found = model.question(item)
        assert found.grids == wanted.grids and found.images[0] is fitted.pixels
        np.testing.assert_array_equal(found.ids, wanted.ids)
        np.testing.assert_array_equal(found.images[0], wanted.images[0])
    with pytest.raises(RerouteError, match="does not exist"):
        model.image(path)


def test_an_image_whose_resize_would_take_all_memory_is_refused(monkeypatch, tmp_path):
    """Of a line of 1 x 100,000 pixels, a file of some hundred bytes, LLaVA's resize makes 34 GB."""
    photo(2, 200).save(tmp_path / "line.png")
    assert small().question((tmp_path / "line.png", "what ?")).grids
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    with pytest.raises(
        RerouteError, match=r"line.png has 2 x 200 pixels, whose resize to \d+ x \d+ is above the limit"
    ):
        small().question((tmp_path / "line.png", "what ?"))


@pytest.mark.parametrize("family", MODELS)
def test_what_was_made_for_another_checkpoint_is_refused(family):
    """Its size, its grid and its ids are another tokenizer's and image processor's: the answer would be about nothing.
    Another dtype of the same checkpoint takes them."""
    made, asked = MODELS[family](), {"llava": smallest, "qwen2_5_vl": small}[family]()
    again = reroute_jax.load(made.folder, "bfloat16")
    fitted = made.image(photo(64, 64))
    for item, what in (((fitted, "what ?"), "an image"), (made.question((None, "what ?")), "a question")):
        with pytest.raises(RerouteError, match=f"{what} that was made for {made.folder}, asked of {asked.folder}"):
            asked.question(item)
        np.testing.assert_array_equal(again.question(item).ids, made.question(item).ids)


@pytest.mark.parametrize("family", MODELS)
def test_a_batch_gets_the_image_processors_own_numbers(family):
    model = MODELS[family]()
    pictures = [photo(150, 90), photo(97, 140), photo(64, 64)]
    unrouted = Schedule.from_decisions((), (), model.config.num_layers)
    questions = [model.question((pictures[:2], "what differs ?")), model.question((pictures[2], "what is this ?"))]
    layouts = [lay_out(question, model.config, unrouted) for question in questions]
    batch = batch_of(layouts, model.files, unrouted, size=2)
    pixels, _ = model.family.preprocess([open_image(one) for one in pictures], model.image_processor)
    grids = [grid for question in questions for grid in question.grids]
    expected = model.family.pack(pixels, grids, model.config, 4)
    if family == "llava":
        np.testing.assert_array_equal(batch.images.pixels, expected)
    else:
        np.testing.assert_array_equal(batch.images.pixels.patches, expected.patches)
