"""Unrouted LLaVA against transformers' torch model, fp32, prompts of 300+ tokens."""

import jax
import numpy as np
import pytest
import torch

from reroute_jax.models.llava import encode_images
from reroute_jax.routing.merge import merge_arrays
from tests.checkpoints import pair
from tests.tiny import random_ids, random_pixels
from tests.whole import all_logits

LENGTH = 340
HEADS = [pytest.param(4, id="mha"), pytest.param(2, id="gqa")]
QUICK = [HEADS[1], pytest.param(*HEADS[0].values, id=HEADS[0].id, marks=pytest.mark.slow)]


def encoded(model, pixels):
    arrays = merge_arrays(None, [model.config.vision.grid] * len(pixels), len(pixels), 36)
    return jax.jit(lambda pixels: encode_images(model.module, pixels, arrays, None))(pixels)


@pytest.mark.parametrize("kv_heads", HEADS)
def test_image_features(kv_heads):
    theirs, ours = pair(kv_heads)
    pixels = random_pixels(2)
    with torch.no_grad():
        found = theirs.model.get_image_features(torch.from_numpy(pixels)).pooler_output
    features, anchors = encoded(ours, pixels)
    expected = torch.stack(list(found)).numpy()
    np.testing.assert_allclose(np.asarray(features), expected, atol=1e-5)
    np.testing.assert_array_equal(anchors, np.tile(np.arange(36), (2, 1)))


@pytest.mark.parametrize("start", [0, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kv_heads", QUICK)
def test_all_position_logits(kv_heads, start):
    theirs, ours = pair(kv_heads)
    ids, pixels = random_ids(LENGTH, start=start)[None], random_pixels(1)
    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(ids), pixel_values=torch.from_numpy(pixels)).logits.numpy()
    features, visual = np.asarray(encoded(ours, pixels)[0])[0], np.arange(start, start + 36)
    found = all_logits(ours.module.decoder, ids[0], np.arange(LENGTH)[None], visual, features)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    last = ours.prefill(input_ids=ids, pixel_values=pixels).logits
    np.testing.assert_allclose(last, expected[:, -1], atol=1e-4)


@pytest.mark.parametrize("penalty", [1.3, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kv_heads", QUICK)
def test_greedy_tokens(kv_heads, penalty):
    theirs, ours = pair(kv_heads)
    ids, pixels = random_ids(LENGTH, start=7, seed=1)[None], random_pixels(1, seed=1)
    with torch.no_grad():
        expected = theirs.generate(
            input_ids=torch.from_numpy(ids),
            pixel_values=torch.from_numpy(pixels),
            max_new_tokens=32,
            do_sample=False,
            eos_token_id=None,
            repetition_penalty=penalty,
        )[0, LENGTH:]
    found = ours.generate_ids(input_ids=ids, pixel_values=pixels, max_new_tokens=32, repetition_penalty=penalty)
    np.testing.assert_array_equal(found[0], expected.numpy())
    assert len(set(found[0].tolist())) > 8


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", QUICK)
def test_text_only(kv_heads):
    theirs, ours = pair(kv_heads)
    ids = random_ids(300, start=None)[None]
    with torch.no_grad():
        expected = theirs.generate(
            input_ids=torch.from_numpy(ids), max_new_tokens=12, do_sample=False, eos_token_id=None
        )[0, 300:]
    schedule = ours.plan("pdrop", budget=128)
    for given in (None, schedule):
        found = ours.generate_ids(input_ids=ids, schedule=given, max_new_tokens=12)
        np.testing.assert_array_equal(found[0], expected.numpy())
