"""How large Qwen's images may be: the checkpoint says it, unless `load` is told otherwise or the harness asks."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor

import reroute_jax
from evals.harness.cli import load_model
from evals.harness.pixels import HARNESS_PIXELS, with_harness_pixels
from reroute_jax.errors import RerouteError
from reroute_jax.models import FAMILIES, read_config
from tests.tiny import tiny_llava
from tests.tiny_qwen import TOKEN, tiny_qwen
from tests.tiny_qwen3 import tiny_qwen3

LIMITS = (200704, 1003520)
SPELLINGS = {
    "size": {"size": {"shortest_edge": LIMITS[0], "longest_edge": LIMITS[1]}},
    "min_pixels": {"min_pixels": LIMITS[0], "max_pixels": LIMITS[1]},
    "both": {"size": {"shortest_edge": 10, "longest_edge": 20}, "min_pixels": LIMITS[0], "max_pixels": LIMITS[1]},
    "in size": {"size": {"min_pixels": LIMITS[0], "max_pixels": LIMITS[1]}},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_qwen(tmp_path_factory.mktemp("qwen"), layers=2, vision_layers=3)


def set_limits(folder, entries, nested=False):
    """In preprocessor_config.json, or nested in processor_config.json as transformers 5 writes it."""
    flat, joint = folder / "preprocessor_config.json", folder / "processor_config.json"
    stored = json.loads(flat.read_text()) if flat.exists() else json.loads(joint.read_text())["image_processor"]
    for file in (flat, joint):
        file.unlink(missing_ok=True)
    settings = {k: v for k, v in stored.items() if k not in ("size", "min_pixels", "max_pixels")} | entries
    (joint if nested else flat).write_text(json.dumps({"image_processor": settings} if nested else settings))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_checkpoints_limits_are_followed(checkpoint, spelling, nested):
    set_limits(checkpoint, SPELLINGS[spelling], nested)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (1000, 1000, 3), np.uint8))
    model = reroute_jax.load(checkpoint)
    assert model.visual_grid(image) == (71, 71)
    if spelling != "in size":  # which transformers itself reads and then cannot use
        theirs = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")(images=image, return_tensors="np")
        _, thw = model.family.preprocess([image], model.image_processor)
        np.testing.assert_array_equal(thw, theirs["image_grid_thw"])
        assert thw.prod() // 4 == 5041


def test_limits_of_the_caller_and_of_the_harness(checkpoint):
    set_limits(checkpoint, SPELLINGS["size"])
    image = Image.new("RGB", (1000, 1000))
    assert reroute_jax.load(checkpoint, pixel_limits=(100, 400 * TOKEN**2)).visual_grid(image) == (20, 20)
    model = load_model(str(checkpoint), None)
    assert model.visual_grid(image) == (48, 48) and model.config.pixel_limits == HARNESS_PIXELS
    set_limits(checkpoint, {"min_pixels": 100, "max_pixels": 400 * TOKEN**2})
    narrow = load_model(str(checkpoint), None)
    assert narrow.config.pixel_limits is None and narrow.visual_grid(image) == (20, 20)


def test_a_larger_token_gets_a_larger_limit_of_the_harness(tmp_path):
    """Of 32 pixels a side: 576 tokens as of 28, and not 441."""
    folder = tiny_qwen3(tmp_path, layers=3)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["patch_size"] = 16
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil", patch_size=16, max_pixels=16384 * 1024)
    limited = with_harness_pixels(read_config(config), lambda: processor)
    assert limited.pixel_limits == (200704, 589824)
    assert FAMILIES["qwen3_vl"].typical_grid(limited, lambda: processor) == (24, 24)


def test_plans_need_no_image_processor_where_the_grid_is_known(checkpoint, tmp_path):
    set_limits(checkpoint, SPELLINGS["size"])
    (checkpoint / "preprocessor_config.json").rename(tmp_path / "preprocessor_config.json")
    try:
        model = reroute_jax.load(checkpoint)
        with pytest.raises(RerouteError, match="lacks tokenizer or image processor files"):
            model.plan("fastv", budget=128)
        assert model.plan("fastv", budget=0.8, grid=(12, 10)).decisions
        known = reroute_jax.load(checkpoint, pixel_limits=(1, 144 * TOKEN**2))
        assert known.reference_grid == (12, 12) and known.plan("fastv", budget=0.8).decisions
    finally:
        (tmp_path / "preprocessor_config.json").rename(checkpoint / "preprocessor_config.json")


@pytest.mark.parametrize("limits", [(500, 400), (0, 10**6), (1, TOKEN**2 - 1), (True, 10**6)])
def test_limits_that_cannot_be(checkpoint, limits):
    with pytest.raises(RerouteError, match=r"pixel_limits are .* expected two whole numbers"):
        reroute_jax.load(checkpoint, pixel_limits=limits)


def test_limits_are_for_families_that_have_them(tmp_path):
    with pytest.raises(RerouteError, match="pixel_limits is for qwen2_5_vl and qwen3_vl, this model is llava"):
        reroute_jax.load(tiny_llava(tmp_path, kv_heads=2, layers=1), pixel_limits=(1, 10**6))


def test_a_processor_without_limits(checkpoint):
    set_limits(checkpoint, {"size": {"height": 56, "width": 56}})
    with pytest.raises(RerouteError):
        reroute_jax.load(checkpoint).image_processor  # noqa: B018
