"""Pictures show the image as the model sees it: pixels back from the processor's output, on any grid and crop."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil
from transformers.image_utils import SizeDict

from convert.embedded import locate
from reroute_jax.models import FAMILIES, read_config
from reroute_jax.vision.qwen_images import visual_grid


def picture(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, np.full_like(red, 90)], axis=-1).astype(np.uint8))


def levels(pixels: np.ndarray, processor) -> np.ndarray:
    return 255 * (pixels * np.array(processor.image_std) + np.array(processor.image_mean))


@pytest.mark.parametrize("sizes", [[(112, 112)], [(84, 168), (168, 56)]])
def test_qwen_patches_become_their_images_again(sizes):
    folder, family = Path(locate("scenes-qwen")), FAMILIES["qwen2_5_vl"]
    config = read_config(json.loads((folder / "config.json").read_text()))
    processor = family.image_processor(folder, config)
    images = [picture(*size) for size in sizes]
    pixel_values, thw = family.preprocess(images, processor)
    grids = family.image_grids(pixel_values, thw, config)
    assert grids == [visual_grid(size, processor) for size in sizes]
    for image, pixels in zip(images, family.unpack(pixel_values, grids, config), strict=True):
        size = family.model_size(image.size, processor)
        assert pixels.shape == (size[1], size[0], 3)
        expected = np.asarray(picture(*size), float)
        assert np.abs(levels(pixels, processor) - expected).max() < 12


@pytest.mark.parametrize("to", [{"shortest_edge": 336}, {"height": 400, "width": 360}], ids=["by its side", "by both"])
@pytest.mark.parametrize("size", [(640, 480), (300, 500), (336, 336)])
def test_llava_sees_the_part_that_it_says(size, to):
    processor = CLIPImageProcessorPil()
    processor.size, processor.crop_size = SizeDict(**to), {"width": 336, "height": 336}
    family = FAMILIES["llava"]
    pixels, _ = family.preprocess([picture(*size)], processor)
    (seen,) = family.unpack(pixels, [(24, 24)], None)
    x1, y1, x2, y2 = family.seen_part(size, processor)
    red, green = levels(seen, processor)[..., :2].transpose(2, 0, 1) / 255
    found = red[:, 0].mean(), green[0].mean(), red[:, -1].mean(), green[-1].mean()
    np.testing.assert_allclose(found, (x1, y1, x2, y2), atol=0.012)
