import math

import numpy as np
import pytest
from PIL import Image
from transformers import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as hf_smart_resize

from evals.harness.pixels import HARNESS_PIXELS
from reroute_jax.errors import RerouteError
from reroute_jax.vision.qwen_images import (
    final_size,
    first_size,
    fit,
    preprocess,
    resize_like_reference,
    smart_resize,
    visual_grid,
)
from reroute_jax.vision.qwen_images import patches as patches_of

FACTOR = 28
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = np.array([0.26862954, 0.26130258, 0.27577711])[:, None, None]

# The specification's table: original, first and final (width, height), visual tokens, what one resize would give.
SIZES = [
    ((640, 480), (644, 476), (644, 476), 391, (644, 476)),
    ((640, 427), (644, 420), (644, 420), 345, (644, 420)),
    ((500, 375), (504, 364), (532, 392), 266, (532, 392)),
    ((640, 640), (644, 644), (644, 644), 529, (644, 644)),
    ((640, 200), (644, 196), (840, 252), 270, (812, 252)),
    ((1024, 768), (1036, 756), (784, 560), 560, (756, 560)),
    ((1920, 1080), (1932, 1092), (868, 504), 558, (896, 504)),
]


@pytest.fixture(scope="module")
def processor() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(min_pixels=HARNESS_PIXELS[0], max_pixels=HARNESS_PIXELS[1])


@pytest.fixture(scope="module")
def small() -> Qwen2VLImageProcessorPil:
    """An embedded model's: 14 pixels a visual token, few of them."""
    return Qwen2VLImageProcessorPil(patch_size=7, min_pixels=48 * 196, max_pixels=80 * 196)


def photo(size: tuple[int, int], seed: int = 0, bands: int = 3) -> Image.Image:
    """Blurred noise."""
    rng = np.random.default_rng(seed)
    noise = Image.fromarray(rng.integers(0, 256, (12, 16, bands)).astype(np.uint8))
    return noise.resize(size, Image.Resampling.BICUBIC)


def patches(image: Image.Image, patch: int, merge: int = 2) -> np.ndarray:
    """pixel_values of a finally sized image, gathered patch by patch."""
    values = (np.asarray(image, np.float64).transpose(2, 0, 1) / 255 - MEAN) / STD
    side, rows = patch * merge, []
    for top in range(0, image.height, side):
        for left in range(0, image.width, side):
            for y in range(top, top + side, patch):
                for x in range(left, left + side, patch):
                    one = values[:, y : y + patch, x : x + patch]
                    rows.append(np.stack([one, one], axis=1).ravel())
    return np.array(rows)


@pytest.mark.parametrize(("original", "first", "final", "tokens", "once"), SIZES)
def test_sizes_of_the_specification(original, first, final, tokens, once, processor) -> None:
    assert first_size(original, FACTOR) == first
    assert final_size(original, processor) == final
    rows, cols = visual_grid(original, processor)
    assert (cols * FACTOR, rows * FACTOR) == final
    assert rows * cols == tokens
    assert smart_resize(original, FACTOR, *HARNESS_PIXELS) == once


def test_one_resize_would_change_as_many_grids_as_the_specification_counts(processor) -> None:
    sizes = [size for side in range(200, 641) for size in ((640, side), (side, 640))]
    differing = [s for s in sizes if final_size(s, processor) != smart_resize(s, FACTOR, *HARNESS_PIXELS)]
    assert (len(differing), len(sizes)) == (138, 882)


@pytest.mark.parametrize("factor", [14, 28])
def test_each_resize_rounds_as_transformers_does(factor: int) -> None:
    rng = np.random.default_rng(0)
    for width, height in rng.integers(factor, 3000, (400, 2)).tolist():
        if max(width, height) > 200 * min(width, height):
            continue
        for limits in (HARNESS_PIXELS, (4 * factor**2, 16384 * factor**2), (48 * factor**2, 80 * factor**2)):
            expected = hf_smart_resize(height, width, factor, *limits)
            assert smart_resize((width, height), factor, *limits) == expected[::-1]


@pytest.mark.parametrize("size", [(640, 480), (500, 375), (640, 200), (375, 500)])
def test_pixels_are_those_of_the_two_resizes(size, processor) -> None:
    image = photo(size)
    first = image.resize(first_size(size, FACTOR), Image.Resampling.BICUBIC)
    assert np.array_equal(resize_like_reference(image, FACTOR), first)
    pixels, grid = preprocess([image], processor)
    theirs = processor(images=[first], return_tensors="np")
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, theirs["pixel_values"])
    np.testing.assert_array_equal(grid, theirs["image_grid_thw"])
    second = first.resize(final_size(size, processor), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(pixels, patches(second, 14), atol=1e-5)
    rows, cols = visual_grid(size, processor)
    assert grid.tolist() == [[1, 2 * rows, 2 * cols]]


def test_two_resizes_are_not_one(processor) -> None:
    """(500, 375) ends at the same size either way, with other pixels; (640, 200) with another grid."""
    for size, same_grid in (((500, 375), True), ((640, 200), False)):
        pixels, grid = preprocess([photo(size)], processor)
        once = processor(images=[photo(size)], return_tensors="np")
        assert np.array_equal(grid, once["image_grid_thw"]) == same_grid
        if same_grid:
            assert np.abs(pixels - once["pixel_values"]).max() > 0.01


def test_second_resize_leaves_a_fitting_image_alone(processor) -> None:
    pixels, _ = preprocess([photo((644, 476))], processor)
    np.testing.assert_allclose(pixels, patches(photo((644, 476)), 14), atol=1e-5)


def test_several_images_of_an_embedded_model(small) -> None:
    images = [photo((112, 112)), photo((98, 126), 1), photo((200, 90), 2)]
    pixels, grid = preprocess(images, small)
    assert [final_size(image.size, small) for image in images] == [(112, 112), (98, 126), (182, 70)]
    assert grid.tolist() == [[1, 16, 16], [1, 18, 14], [1, 10, 26]]
    assert pixels.shape == (grid.prod(1).sum(), 3 * 2 * 7 * 7)
    np.testing.assert_allclose(pixels[256:508], patches(images[1], 7), atol=1e-5)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1, 201), "1 x 201 pixels: expected sides of a ratio up to 200"),
        ((400, 1), "400 x 1 pixels: expected sides of a ratio up to 200"),
        ((28, 5601), "28 x 5601 pixels: expected sides of a ratio up to 200"),
        ((5796, 28), "5796 x 28 pixels: expected sides of a ratio up to 200"),
        ((5800, 29), "5796 x 28 pixels: expected sides of a ratio up to 200"),  # only after the first resize
    ],
)
def test_sizes_that_are_not_taken_give_one_line_with_the_images_name(size, expected, processor, tmp_path) -> None:
    bad = Image.new("RGB", size)
    with pytest.raises(RerouteError, match=f"image 2 has {expected}"):
        preprocess([photo((56, 56)), bad], processor)
    bad.save(tmp_path / "thin.png")
    with Image.open(tmp_path / "thin.png") as opened, pytest.raises(RerouteError, match=r"thin\.png has") as found:
        preprocess([opened], processor)
    assert "\n" not in str(found.value)


def first_resize_of_qwen_vl_utils(size: tuple[int, int], factor: int) -> tuple[int, int]:
    """Version 0.0.14, worked out apart: the nearest multiple, at least one, and up where that is under 4 tokens."""
    rounded = [max(1, round(side / factor)) for side in size]
    if rounded[0] * rounded[1] < 4:
        grow = (4 * factor**2 / (size[0] * size[1])) ** 0.5
        rounded = [math.ceil(side * grow / factor) for side in size]
    return rounded[0] * factor, rounded[1] * factor


@pytest.mark.parametrize("factor", [14, 28])
def test_narrow_images_are_taken_as_both_resizes_of_the_reference_take_them(factor: int) -> None:
    own = Qwen2VLImageProcessorPil(patch_size=factor // 2, min_pixels=4 * factor**2, max_pixels=1000 * factor**2)
    harness = Qwen2VLImageProcessorPil(patch_size=factor // 2, min_pixels=256 * factor**2, max_pixels=576 * factor**2)
    for side in range(1, factor):
        for other in (1, 2, 9, 13, 14, 27, 28, 40, 41, 42, 43, 100, 199, 200, 640, 1001, 5400):
            for size in ((side, other), (other, side)):
                if max(size) > 200 * min(size):
                    continue
                first = first_resize_of_qwen_vl_utils(size, factor)
                assert first_size(size, factor) == first
                for processor in (own, harness):
                    limits = processor.size["shortest_edge"], processor.size["longest_edge"]
                    assert final_size(size, processor) == hf_smart_resize(*first[::-1], factor, *limits)[::-1]


@pytest.mark.parametrize("size", [(9, 40), (40, 9), (1, 1), (1, 200), (27, 27), (13, 28), (3, 500)])
def test_pixels_of_narrow_images_are_those_of_transformers(size, processor) -> None:
    image = photo(size)
    first = image.resize(first_resize_of_qwen_vl_utils(size, FACTOR), Image.Resampling.BICUBIC)
    theirs = processor(images=[first], return_tensors="np")
    pixels, grid = preprocess([image], processor)
    np.testing.assert_array_equal(pixels, theirs["pixel_values"])
    np.testing.assert_array_equal(grid, theirs["image_grid_thw"])
    rows, cols = visual_grid(size, processor)
    assert grid.tolist() == [[1, 2 * rows, 2 * cols]]


def test_an_elongated_image_that_is_taken(processor) -> None:
    assert final_size((5600, 28), processor)[0] > 5600


def test_fitted_images_are_held_in_8_bits_and_give_the_same_pixels(processor) -> None:
    images = [photo(size) for size in ((640, 200), (1200, 900), (9, 40))]
    fitted = [fit(image, processor) for image in images]
    assert [one.shape[1::-1] for one in fitted] == [final_size(image.size, processor) for image in images]
    first = [image.resize(first_size(image.size, FACTOR), Image.Resampling.BICUBIC) for image in images]
    theirs = processor(images=first, return_tensors="np")
    found, grid = patches_of(fitted, processor)
    np.testing.assert_array_equal(found, theirs["pixel_values"])
    np.testing.assert_array_equal(grid, theirs["image_grid_thw"])
