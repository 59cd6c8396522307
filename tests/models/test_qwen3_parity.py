"""Unrouted Qwen3-VL against transformers' torch model, fp32: odd grids, several images, a prompt of 300+ tokens."""

import numpy as np
import pytest
import torch

from convert.crosscheck.plain import image_features
from reroute_jax.errors import RerouteError
from tests.checkpoints import qwen3_pair
from tests.models.test_qwen_parity import features_of, in_torch
from tests.ragged import padded
from tests.tiny_qwen import IM_END, IMAGE, VIDEO, random_ids, random_patches
from tests.whole import all_logits

LENGTH = 340
# In patches larger than the table of positions and smaller, none square.
GRIDS = ((7, 5), (3, 10), (1, 2))
HEADS = [pytest.param(False, id="untied-hub"), pytest.param(True, id="tied-v5", marks=pytest.mark.slow)]


def test_image_and_deepstack_features():
    theirs, ours = qwen3_pair()
    pixels, thw = random_patches(GRIDS, seed=2)
    with torch.no_grad():
        expected = image_features(theirs, {"pixel_values": torch.tensor(pixels), "image_grid_thw": torch.tensor(thw)})
    assert expected.shape[1] == 4 * 64
    np.testing.assert_allclose(features_of(ours, pixels, GRIDS), expected, atol=1e-5)


@pytest.mark.parametrize("tied", HEADS)
def test_positions_logits_and_greedy_tokens(tied):
    theirs, ours = qwen3_pair(tied)
    ids, (pixels, thw) = random_ids(LENGTH, GRIDS, start=11), random_patches(GRIDS, seed=2)
    given = in_torch(ids, pixels, thw)
    with torch.no_grad():
        expected = theirs(**given).logits[:, -1]
        made = theirs.generate(**given, do_sample=False, eos_token_id=None, max_new_tokens=32)[:, LENGTH:]
        wanted, delta = theirs.model.get_rope_index(
            given["input_ids"], given["mm_token_type_ids"], given["image_grid_thw"]
        )
    positions, next_position = ours.family.positions(ids, GRIDS, ours.config)
    np.testing.assert_array_equal(positions, wanted[:, 0])
    assert next_position == LENGTH + int(delta)
    images = {"pixel_values": pixels, "image_grid_thw": thw}
    np.testing.assert_allclose(ours.prefill(input_ids=ids[None], **images).logits, expected, atol=1e-4)
    tokens = ours.generate_ids(input_ids=ids[None], **images, max_new_tokens=32)
    np.testing.assert_array_equal(tokens, made)
    assert len(set(tokens[0].tolist())) > 8


def test_logits_of_all_positions_without_a_cache():
    theirs, ours = qwen3_pair()
    ids, (pixels, thw) = random_ids(LENGTH, GRIDS, start=11), random_patches(GRIDS, seed=2)
    with torch.no_grad():
        expected = theirs(**in_torch(ids, pixels, thw)).logits.numpy()
    visual, levels = np.flatnonzero(ids == IMAGE), np.split(features_of(ours, pixels, GRIDS), 4, axis=1)
    positions, _ = ours.family.positions(ids, GRIDS, ours.config)
    found = all_logits(ours.module.decoder, ids, positions[:, None], visual, *levels)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
def test_a_batch_of_rows_with_none_one_and_two_images():
    theirs, ours = qwen3_pair()
    images = [(), GRIDS[:1], GRIDS[1:]]
    rows = [random_ids(size, grids, seed=size) for size, grids in zip((60, 90, 100), images, strict=True)]
    pixels = [random_patches(grids, seed=len(grids)) if grids else (None, None) for grids in images]
    ids, mask = padded(rows, IMAGE)
    given = {
        "pixel_values": np.concatenate([one for one, _ in pixels if one is not None]),
        "image_grid_thw": np.concatenate([thw for _, thw in pixels if thw is not None]),
    }
    found = ours.generate_ids(
        input_ids=ids, attention_mask=mask, **given, max_new_tokens=8, eos_token_id=IM_END, repetition_penalty=1.05
    )
    alone = ours.generate_ids(input_ids=rows[0][None], max_new_tokens=8, eos_token_id=IM_END, repetition_penalty=1.05)
    np.testing.assert_array_equal(found[:1], alone)
    for row, (one, thw), tokens in zip(rows, pixels, found, strict=True):
        given = in_torch(row, one, thw) if thw is not None else {"input_ids": torch.tensor(row)[None]}
        more = {"max_new_tokens": 8, "do_sample": False, "repetition_penalty": 1.05, "eos_token_id": IM_END}
        with torch.no_grad():
            expected = theirs.generate(**given, **more)[0, len(row) :]
        np.testing.assert_array_equal(tokens[: len(expected)], expected)


def test_videos_are_refused():
    _, ours = qwen3_pair()
    with pytest.raises(RerouteError, match="videos are not supported"):
        ours.prefill(input_ids=np.append(random_ids(20), VIDEO)[None])
