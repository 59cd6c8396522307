"""Choosing tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from reroute_jax.engine.generation import Sampling, _nucleus, choose
from tests.checkpoints import pair
from tests.tiny import random_ids, random_pixels


def test_repetition_penalty_moves_the_maximum():
    """evals specification 4.3: [2.0, -1.0, 1.95] with ids 0 and 1 seen becomes [1.90476, -1.05, 1.95]."""
    logits, seen = jnp.array([[2.0, -1.0, 1.95]]), jnp.array([[True, True, False]])
    key = jax.random.key(0)
    assert choose(logits, seen, key, Sampling())[0] == 0
    assert choose(logits, seen, key, Sampling(repetition_penalty=1.05))[0] == 2
    theirs = RepetitionPenaltyLogitsProcessor(1.05)(torch.tensor([[0, 1]]), torch.tensor([[2.0, -1.0, 1.95]]))
    np.testing.assert_allclose(theirs.numpy(), [[1.90476, -1.05, 1.95]], atol=1e-5)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
def test_nucleus_is_transformers(top_p):
    logits = np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32) * 2
    theirs = TopPLogitsWarper(top_p)(None, torch.from_numpy(logits)).numpy()
    np.testing.assert_array_equal(np.asarray(_nucleus(jnp.asarray(logits), top_p)), np.isfinite(theirs))


def test_sampling_follows_the_distribution():
    logits = np.array([[1.0, 0.0, -1.0, 2.0]], np.float32)
    sampling = Sampling(temperature=0.7, top_p=0.95)
    warped = TopPLogitsWarper(0.95)(None, TemperatureLogitsWarper(0.7)(None, torch.from_numpy(logits)))
    expected = torch.softmax(warped, -1)[0].numpy()
    many = jnp.tile(jnp.asarray(logits), (20000, 1))
    drawn = choose(many, jnp.zeros(many.shape, bool), jax.random.key(1), sampling)
    share = np.bincount(np.asarray(drawn), minlength=4) / 20000
    # Four standard errors of a share at 20,000 draws.
    np.testing.assert_allclose(share, expected, atol=4 * 0.5 / 20000**0.5)
    assert share[2] == 0


def test_seed_decides_what_is_drawn():
    _, model = pair(4)
    given = {
        "input_ids": random_ids(60)[None],
        "pixel_values": random_pixels(1),
        "max_new_tokens": 12,
        "temperature": 1.5,
    }
    first, again, other = (model.generate_ids(**given, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_decode_equals_prefill():
    """Teacher-forced: the token after each prefix is what decode chose, for an unrouted prompt."""
    _, model = pair(2)
    ids, pixels = random_ids(60)[None], random_pixels(1)
    tokens = model.generate_ids(input_ids=ids, pixel_values=pixels, max_new_tokens=8)
    for step in range(8):
        longer = np.concatenate([ids, tokens[:, :step]], axis=1)
        logits = model.prefill(input_ids=longer, pixel_values=pixels).logits
        assert logits[0].argmax() == tokens[0, step]
