import numpy as np
import pytest
from PIL import Image
from transformers import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as hf_smart_resize

from evals.harness.pixels import HARNESS_PIXELS
from reroute_jax.errors import RerouteError
from reroute_jax.vision.qwen_images import (
    as_rgb,
    final_size,
    first_size,
    preprocess,
    resize_like_reference,
    smart_resize,
    visual_grid,
)

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


def test_transparent_parts_become_white(processor) -> None:
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (60, 80, 4)).astype(np.uint8)
    data[:30, :, 3] = 0
    found = np.asarray(as_rgb(Image.fromarray(data)))
    assert (found[:30] == 255).all()
    share = data[30:, :, 3:] / 255
    np.testing.assert_allclose(found[30:], share * data[30:, :, :3] + (1 - share) * 255, atol=1)
    clear = Image.new("RGBA", (448, 448), (200, 0, 0, 0))
    np.testing.assert_array_equal(
        preprocess([clear], processor)[0], preprocess([Image.new("RGB", (448, 448), "white")], processor)[0]
    )


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA"])
def test_other_modes_are_converted(mode: str) -> None:
    image = photo((40, 30)).convert(mode)
    assert np.array_equal(as_rgb(image), image.convert("RGB"))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((27, 400), "27 x 400 pixels: expected at least 28 on each side"),
        ((400, 1), "400 x 1 pixels: expected at least 28 on each side"),
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


def test_the_narrowest_images_that_are_taken(processor) -> None:
    assert final_size((28, 28), processor) == (448, 448)
    assert final_size((5600, 28), processor)[0] > 5600


def test_an_embedded_model_takes_sides_of_its_own_visual_token(small) -> None:
    preprocess([photo((14, 14))], small)
    with pytest.raises(RerouteError, match="13 x 14 pixels: expected at least 14"):
        preprocess([photo((13, 14))], small)
