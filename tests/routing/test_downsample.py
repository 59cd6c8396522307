"""The control `downsample`: sizes by hand, resizing as PyTorch has it, and an ordinary run on the smaller image."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from convert.crosscheck import merges
from evals.harness.boxes import normalise_box, shrunk
from evals.harness.data import Doc
from evals.harness.runner import as_seen
from reroute_jax.errors import RerouteError
from reroute_jax.models.llava import FAMILY as LLAVA
from reroute_jax.routing.downsample import Downsample, bicubic
from reroute_jax.routing.methods import plan
from reroute_jax.routing.plan import Schedule
from reroute_jax.vision.clip import cubic_weights
from tests.checkpoints import LAYERS, qwen_pair
from tests.tiny_qwen import MERGE, PATCH, random_ids, random_patches


# 16.4: g = 8, 11, 13 of LLaVA's 24 for 64, 128, 192.
def test_llava_stays_square():
    made = [plan("downsample", num_layers=32, visual=576, grid=(24, 24), budget=tier) for tier in (64, 128, 192)]
    assert [schedule.merge.cells((24, 24)) for schedule in made] == [(8, 8), (11, 11), (13, 13)]
    assert [schedule.merged_count(576, (24, 24)) for schedule in made] == [64, 121, 169]
    assert plan("downsample", num_layers=32, visual=576, grid=(24, 24), keep=64).merge == Downsample(
        count=64, square=True
    )


@pytest.mark.parametrize(
    ("grid", "tokens", "cells"),
    [
        ((24, 24), 64, (8, 8)),
        ((24, 24), 192, (16, 12)),  # 12 x 16 is as near: more rows
        ((14, 20), 70, (7, 10)),
        ((20, 14), 62, (10, 6)),  # 62 and 61 need a longer side; of 60, 10 x 6 stretches least
        ((1, 9), 4, (1, 4)),
        ((3, 5), 40, (3, 5)),
    ],
)
def test_other_images_become_the_largest_grid_then_the_least_stretched(grid, tokens, cells):
    merge = Downsample(count=tokens)
    assert merge.cells(grid) == merges.smaller_grid(merge, grid) == cells
    assert merge.anchors(grid[0] * grid[1], grid) == math.prod(cells)


def test_shares_are_upper_bounds():
    """2/9 of 35 tokens are 7.8."""
    assert Downsample(Fraction(2, 9)).cap(35) == 7 and Downsample(Fraction(1, 9)).cap(5) == 1
    assert Downsample(Fraction(1, 9), blur=True).anchors(36, (6, 6)) == 36


@pytest.mark.parametrize(("height", "width"), [(28, 42), (84, 84), (100, 30)])
def test_bicubic(height, width):
    image = np.random.default_rng(0).normal(size=(84, 56, 3)).astype(np.float32)
    expected = merges.bicubic(torch.tensor(image).permute(2, 0, 1)[None], (height, width))
    np.testing.assert_allclose(bicubic(image, height, width), expected[0].permute(1, 2, 0), atol=1e-5)


@pytest.mark.parametrize("count", [3, 8, 24])
def test_weights_of_the_position_table(count):
    table = np.random.default_rng(1).normal(size=(24, 24)).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.tensor(table)[None, None], (count, 24), mode="bicubic")[0, 0]
    np.testing.assert_allclose(cubic_weights(24, count) @ table, expected, atol=1e-5)


def test_pixels_there_and_back():
    family = qwen_pair()[1].family
    config, grids = qwen_pair()[1].config, [(3, 5), (4, 2)]
    pixels, _ = random_patches(grids)
    np.testing.assert_array_equal(family.repack(family.unpack(pixels, grids, config), grids, config), pixels)
    image = np.random.default_rng(2).random((2, 3, 28, 28), np.float32)
    np.testing.assert_array_equal(LLAVA.repack(LLAVA.unpack(image, [(2, 2)] * 2, None), [(2, 2)] * 2, None), image)


def test_qwen_runs_as_an_ordinary_prompt_with_the_smaller_image():
    _, model = qwen_pair()
    merge, grid = Downsample(count=12), (7, 5)
    cells, schedule = merge.cells(grid), Schedule.from_decisions((), (), LAYERS, merge=merge)
    pixels, thw = random_patches([grid])
    (image,) = model.family.unpack(pixels, [grid], model.config)
    rows, cols = (count * MERGE for count in cells)
    small = bicubic(image, rows * PATCH, cols * PATCH)
    ids = random_ids(60, [grid], start=4)
    visual = np.flatnonzero(ids == model.config.image_token)
    shorter = np.delete(ids, visual[math.prod(cells) :])
    found = model.prefill(input_ids=ids[None], pixel_values=pixels, image_grid_thw=thw, schedule=schedule, trace=True)
    plain = model.prefill(
        input_ids=shorter[None],
        pixel_values=model.family.repack([small], [cells], model.config),
        image_grid_thw=np.array([(1, rows, cols)]),
    )
    np.testing.assert_allclose(found.logits, plain.logits, atol=1e-4)
    assert (found.trace.kv_tokens == len(shorter)).all() and found.trace.anchors.shape == (1, math.prod(cells))


def test_boxes_in_pixels_are_in_those_of_the_smaller_image():
    """16 x 12 of 24 x 24 tokens: half as wide as tall."""
    schedule = Schedule.from_decisions((), (), 2, merge=Downsample(count=192))
    doc = Doc(0, "0", Image.new("RGB", (240, 240)), (240, 240), "cup", (0, 0, 1, 1))
    seen = as_seen(doc, schedule, (24, 24))
    assert seen.shrinking == (Fraction(1, 2), Fraction(2, 3))
    assert normalise_box((0, 0, 120, 160), "pixel", shrunk(doc.size, seen.shrinking)) == (0, 0, 1, 1)
    assert as_seen(doc, Schedule.from_decisions((), (), 2), (24, 24)) == doc


def test_refusals():
    with pytest.raises(RerouteError, match="either a share or a count"):
        Downsample()
    with pytest.raises(RerouteError, match="no use for blur=True"):
        plan("pool", num_layers=4, visual=36, grid=(6, 6), budget=128, blur=True)
    qwen = qwen_pair()[1]
    pixels, thw = random_patches([(3, 4)])
    renumbered = qwen.plan("downsample", budget=192, position_mode="renumber")
    with pytest.raises(RerouteError, match="no meaning for positions of three channels"):
        qwen.prefill(
            input_ids=random_ids(30, [(3, 4)])[None], pixel_values=pixels, image_grid_thw=thw, schedule=renumbered
        )
