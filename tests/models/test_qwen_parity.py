"""Unrouted Qwen2.5-VL against transformers' torch model, fp32: odd grids, several images, prompts of 300+ tokens."""

import jax
import numpy as np
import pytest
import torch

from reroute_jax.errors import RerouteError
from reroute_jax.routing.merge import merge_arrays
from tests.checkpoints import qwen_pair
from tests.ragged import padded
from tests.tiny_qwen import IM_END, IMAGE, VIDEO, random_ids, random_patches
from tests.whole import all_logits

LENGTH = 340
# No side but one is a multiple of the window, 4 x 4, and no image is square.
GRIDS = ((7, 5), (3, 10), (4, 6))
HEADS = [pytest.param(False, id="untied-hub"), pytest.param(True, id="tied-v5")]
QUICK = [HEADS[1], pytest.param(*HEADS[0].values, id=HEADS[0].id, marks=pytest.mark.slow)]


def in_torch(ids, pixels, thw):
    """What transformers' processor makes; without the token kinds the model takes one-channel positions, silently."""
    tokens = torch.tensor(ids)[None]
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": torch.tensor(pixels),
        "image_grid_thw": torch.tensor(thw),
        "mm_token_type_ids": (tokens == IMAGE).int(),
    }


def features_of(model, pixels, grids):
    """[F, D] of all images together."""
    family, largest = model.family, max(rows * cols for rows, cols in grids)
    arrays = merge_arrays(None, grids, len(grids), family.token_bucket(largest))
    encode = jax.jit(lambda packed: family.encode_images(model.module, packed, arrays, None)[0])
    found = np.asarray(encode(family.pack(pixels, grids, model.config, len(grids))))
    return np.concatenate([one[: rows * cols] for one, (rows, cols) in zip(found, grids, strict=True)])


@pytest.mark.parametrize("grids", [GRIDS, ((1, 1), (1, 9), (2, 2)), ((8, 8),)], ids=["odd", "small", "whole-windows"])
def test_image_features(grids):
    theirs, ours = qwen_pair()
    pixels, thw = random_patches(grids, seed=2)
    with torch.no_grad():
        expected = theirs.model.get_image_features(torch.tensor(pixels), torch.tensor(thw)).pooler_output
    np.testing.assert_allclose(features_of(ours, pixels, grids), torch.cat(list(expected)), atol=1e-5)


@pytest.mark.parametrize("tied", QUICK)
def test_positions_and_all_position_logits(tied):
    theirs, ours = qwen_pair(tied)
    ids, (pixels, thw) = random_ids(LENGTH, GRIDS, start=11), random_patches(GRIDS)
    given = in_torch(ids, pixels, thw)
    with torch.no_grad():
        expected = theirs(**given).logits.numpy()
        wanted, delta = theirs.model.get_rope_index(
            given["input_ids"], given["mm_token_type_ids"], given["image_grid_thw"]
        )
    positions, next_position = ours.family.positions(ids, GRIDS, ours.config)
    np.testing.assert_array_equal(positions, wanted[:, 0])
    assert next_position == LENGTH + int(delta)
    visual, features = np.flatnonzero(ids == IMAGE), features_of(ours, pixels, GRIDS)
    found = all_logits(ours.module.decoder, ids, positions[:, None], visual, features)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    last = ours.prefill(input_ids=ids[None], pixel_values=pixels, image_grid_thw=thw).logits
    np.testing.assert_allclose(last, expected[:, -1], atol=1e-4)


@pytest.mark.parametrize("penalty", [1.05, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tied", QUICK)
def test_greedy_tokens(tied, penalty):
    theirs, ours = qwen_pair(tied)
    ids, (pixels, thw) = random_ids(LENGTH, GRIDS, start=7, seed=1), random_patches(GRIDS, seed=1)
    more = {"max_new_tokens": 24, "repetition_penalty": penalty}
    with torch.no_grad():
        expected = theirs.generate(**in_torch(ids, pixels, thw), do_sample=False, eos_token_id=None, **more)
    found = ours.generate_ids(input_ids=ids[None], pixel_values=pixels, image_grid_thw=thw, **more)
    np.testing.assert_array_equal(found, expected[:, LENGTH:])
    assert len(set(found[0].tolist())) > 6


@pytest.mark.slow
@pytest.mark.parametrize("tied", QUICK)
def test_text_only(tied):
    theirs, ours = qwen_pair(tied)
    ids = random_ids(300)[None]
    tokens = torch.tensor(ids)
    with torch.no_grad():
        expected = theirs.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            repetition_penalty=1.0,
        )[:, 300:]
    for schedule in (None, ours.plan("pdrop", budget=128)):
        found = ours.generate_ids(input_ids=ids, schedule=schedule, max_new_tokens=12)
        np.testing.assert_array_equal(found, expected)


def test_a_batch_of_rows_with_none_one_and_two_images():
    theirs, ours = qwen_pair()
    images = [(), GRIDS[:1], GRIDS[1:]]
    rows = [random_ids(size, grids, seed=size) for size, grids in zip((60, 90, 100), images, strict=True)]
    pixels = [random_patches(grids, seed=len(grids)) if grids else (None, None) for grids in images]
    ids, mask = padded(rows, IMAGE)
    found = ours.generate_ids(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=np.concatenate([one for one, _ in pixels if one is not None]),
        image_grid_thw=np.concatenate([thw for _, thw in pixels if thw is not None]),
        max_new_tokens=8,
        eos_token_id=IM_END,
    )
    for row, (one, thw), tokens in zip(rows, pixels, found, strict=True):
        given = in_torch(row, one, thw) if thw is not None else {"input_ids": torch.tensor(row)[None]}
        with torch.no_grad():
            expected = theirs.generate(
                **given, max_new_tokens=8, do_sample=False, repetition_penalty=1.0, eos_token_id=IM_END
            )[0, len(row) :]
        np.testing.assert_array_equal(tokens[: len(expected)], expected)


IDS = random_ids(80, GRIDS[:1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda given: given.update(image_grid_thw=[[1, 14, 12]]), "image tokens"),
        (lambda given: given.update(image_grid_thw=[[2, 14, 10]]), "video"),
        (lambda given: given.update(image_grid_thw=None), "image_grid_thw"),
        (lambda given: given.update(input_ids=random_ids(80)[None]), "1 images and the prompts have places for 0"),
        (lambda given: given.update(pixel_values=given["pixel_values"][:-4]), "pixel_values"),
        (lambda given: given.update(input_ids=np.append(IDS, VIDEO)[None]), "video"),
    ],
    ids=["grid-and-prompt", "frames", "no-grid", "no-place", "pixels-and-grid", "video-token"],
)
def test_bad_input_gives_one_line(change, said):
    _, ours = qwen_pair()
    pixels, thw = random_patches(GRIDS[:1])
    given = {"input_ids": IDS[None], "pixel_values": pixels, "image_grid_thw": thw}
    change(given)
    with pytest.raises(RerouteError, match=said) as caught:
        ours.prefill(**given)
    assert "\n" not in str(caught.value)
