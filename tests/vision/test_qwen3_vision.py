"""Qwen3-VL's images: sizes, patches, the table of positions, the norms of the mergers; vectors of the specification."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image
from transformers import Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from evals.speed.checkpoint_shapes import SHAPES
from reroute_jax.errors import RerouteError
from reroute_jax.models import FAMILIES, read_config
from reroute_jax.vision.qwen3 import Merger, VisionMLP
from reroute_jax.vision.qwen3_packing import pack, table_taps
from reroute_jax.vision.qwen_config import Qwen3VisionConfig

FAMILY = FAMILIES["qwen3_vl"]
CONFIG = Qwen3VisionConfig(
    hidden_size=2,
    mlp_dim=1,
    num_layers=1,
    num_heads=1,
    patch_size=1,
    temporal_patch_size=1,
    merge=2,
    table_side=48,
    deepstack=(),
)
HUB, CAPPED = (65536, 16777216), (200704, 451584)


def processor(limits=HUB):
    half = [0.5] * 3
    return Qwen2VLImageProcessorPil(
        patch_size=16, min_pixels=limits[0], max_pixels=limits[1], image_mean=half, image_std=half
    )


@pytest.mark.parametrize(
    ("limits", "size", "seen"),
    [
        (HUB, (640, 427), (640, 416)),
        (HUB, (100, 100), (256, 256)),
        (HUB, (1920, 1080), (1920, 1088)),
        (CAPPED, (1920, 1080), (896, 480)),
        (CAPPED, (100, 100), (448, 448)),
    ],
)
def test_sizes(limits, size, seen):
    assert FAMILY.model_size(size, processor(limits)) == seen
    config = read_config(SHAPES["qwen3-vl-2b"].config("float32"))
    assert FAMILY.visual_grid(Image.new("RGB", size), config, processor(limits)) == (seen[1] // 32, seen[0] // 32)


def test_images_are_resized_once_as_transformers_does():
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3)).astype(np.uint8)
    images = [Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC) for size in ((300, 211), (90, 400))]
    theirs = processor()(images=images, return_tensors="np")
    pixels, thw = FAMILY.preprocess(images, processor())
    np.testing.assert_array_equal(thw, theirs["image_grid_thw"])
    np.testing.assert_array_equal(pixels, theirs["pixel_values"])
    assert pixels.shape[1] == 1536 and pixels.min() >= -1 and pixels.max() <= 1
    with pytest.raises(RerouteError, match="sides of a ratio up to 200"):
        FAMILY.fit(Image.new("RGB", (2010, 10)), processor())


@pytest.mark.parametrize("grid", [(2, 3), (1, 1), (25, 50), (1, 30)])
def test_taps_of_the_position_table_are_those_of_transformers(grid):
    """In patches smaller and larger than the table, and one patch wide after no merge."""
    thw = torch.tensor([[1, 2 * grid[0], 2 * grid[1]]])
    options = {"align_corners": True, "spatial_merge_size": 2}
    taps, weights = get_vision_interpolation_indices_and_weights(thw, 48, **options)
    table = np.random.default_rng(0).normal(size=48 * 48)
    count = 4 * grid[0] * grid[1]
    found = pack(np.zeros((count, 3), np.float32), [grid], CONFIG, 1)
    # A place that rounding puts on either side of a row of the table reads other taps, and the same value.
    ours = (table[found.taps[0]] * found.weights[0]).sum(axis=1)
    np.testing.assert_allclose(ours[:count], (table[taps.numpy()] * weights.numpy()).sum(axis=1), atol=1e-4)
    assert not found.weights[0, count:].any()


@pytest.mark.parametrize(
    ("place", "sides", "taps", "weights"),
    [
        ((1, 1), (4, 6), (729, 730, 777, 778), (0.2, 0.1333, 0.4, 0.2667)),
        ((0, 3), (4, 6), (28, 29, 76, 77), (0.8, 0.2, 0, 0)),
        ((7, 33), (50, 100), (303, 304, 351, 352), (0.0952, 0.1905, 0.2381, 0.4762)),
        ((3, 5), (4, 6), (2303,) * 4, (1, 0, 0, 0)),
    ],
)
def test_taps_of_single_patches(place, sides, taps, weights):
    found, shares = table_taps(np.array([place]), sides, 48)
    assert tuple(found[0]) == taps
    np.testing.assert_allclose(shares[0], weights, atol=5e-5)


def test_norms_of_the_mergers():
    """The main merger's sees a patch, DeepStack's the four of a token together."""
    x = jnp.array([[[1, 3], [2, 2.5], [0, 4], [5, 1]]], jnp.float32)
    found = []
    for joined in (False, True):
        merger = Merger(CONFIG, 8, joined, rngs=nnx.Rngs(0), dtype=jnp.float32)
        found.append(merger.norm(x.reshape(1, -1, merger.norm.scale.shape[0])).reshape(-1))
    np.testing.assert_allclose(found[0], [-1, 1, -1, 1, -1, 1, 1, -1], atol=1e-4)
    expected = [-0.8413, 0.4407, -0.2003, 0.1202, -1.4824, 1.0817, 1.7228, -0.8413]
    np.testing.assert_allclose(found[1], expected, atol=1e-4)


def test_the_towers_two_gelus():
    """tanh in the blocks, erf in the mergers; at 2 they are 1.954598 and 1.954500."""
    keep = {"rngs": nnx.Rngs(0), "dtype": jnp.float32}
    mlp, merger = VisionMLP(CONFIG, **keep), Merger(CONFIG, 1, True, **keep)
    for module in (mlp, merger):
        for parameter, first in ((module.fc1.kernel, 0), (module.fc1.bias, 2), (module.fc2.kernel, 1)):
            values = np.zeros(parameter.shape, np.float32)
            values.flat[0] = first
            parameter[...] = jnp.asarray(values)
    run, ones = jax.jit(lambda module, x: module(x)), np.ones((1, 4, 2), np.float32)
    np.testing.assert_allclose(run(mlp, ones)[0, 0, 0], 1.954598, atol=2e-6)
    np.testing.assert_allclose(run(merger, ones)[0, 0, 0], 1.954500, atol=2e-6)
