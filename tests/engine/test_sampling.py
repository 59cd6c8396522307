"""How a token follows from logits."""

from dataclasses import asdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from reroute_jax.engine.sampling import Sampling, _nucleus, choose, row_sampling
from reroute_jax.errors import RerouteError


def chosen(logits, seen=None, **how):
    rows = len(logits)
    seen = jnp.zeros(logits.shape, bool) if seen is None else jnp.asarray(seen)
    return choose(jnp.asarray(logits), seen, jnp.zeros(rows, jnp.int32), row_sampling(Sampling(**how), range(rows)))


def test_repetition_penalty_moves_the_maximum():
    """evals specification 4.3: [2.0, -1.0, 1.95] with ids 0 and 1 seen becomes [1.90476, -1.05, 1.95]."""
    logits, seen = np.array([[2.0, -1.0, 1.95]], np.float32), [[True, True, False]]
    assert chosen(logits, seen)[0] == 0
    assert chosen(logits, seen, repetition_penalty=1.05)[0] == 2
    theirs = RepetitionPenaltyLogitsProcessor(1.05)(torch.tensor([[0, 1]]), torch.tensor([[2.0, -1.0, 1.95]]))
    np.testing.assert_allclose(theirs.numpy(), [[1.90476, -1.05, 1.95]], atol=1e-5)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
def test_nucleus_is_transformers(top_p):
    logits = np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32) * 2
    theirs = TopPLogitsWarper(top_p)(None, torch.from_numpy(logits)).numpy()
    ours = np.asarray(jax.jit(_nucleus)(logits, np.full(6, top_p, np.float32)))
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))


def test_a_share_that_float32_has_no_number_for_is_that_of_the_most_likely_token():
    logits = np.array([[0.0, 1.0, 3.0, 2.0]], np.float32)
    theirs = TopPLogitsWarper(1e-60)(None, torch.from_numpy(logits)).numpy()
    assert np.isfinite(theirs).sum() == 1 and theirs.argmax() == 2
    assert chosen(logits, temperature=1.0, top_p=1e-60)[0] == 2


def test_sampling_follows_the_distribution():
    logits = np.array([[1.0, 0.0, -1.0, 2.0]], np.float32)
    warped = TopPLogitsWarper(0.95)(None, TemperatureLogitsWarper(0.7)(None, torch.from_numpy(logits)))
    expected = torch.softmax(warped, -1)[0].numpy()
    drawn = chosen(np.tile(logits, (20000, 1)), temperature=0.7, top_p=0.95, seed=1)
    share = np.bincount(np.asarray(drawn), minlength=4) / 20000
    # Four standard errors of a share at 20,000 draws.
    np.testing.assert_allclose(share, expected, atol=4 * 0.5 / 20000**0.5)
    assert share[2] == 0


def test_greedy_and_sampled_rows_share_a_batch():
    logits = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    how = row_sampling(Sampling(temperature=5.0), range(3))
    how.temperature[1] = 0
    chosen = jax.jit(choose)
    found = [chosen(logits, np.zeros((3, 50), bool), np.full(3, step, np.int32), how) for step in range(20)]
    columns = np.array(found)
    assert set(columns[:, 1]) == {int(logits[1].argmax())}
    assert len(set(columns[:, 0])) > 5 and len(set(columns[:, 2])) > 5


@pytest.mark.parametrize(
    "wrong",
    [
        *({"seed": 1.5}, {"seed": True}, {"limit": 2.5}, {"temperature": "0.5"}, {"top_p": None}, {"stop": (2.5,)}),
        *({"temperature": 1e39}, {"temperature": 10**400}, {"stop": (2**31,)}),  # no number of the programs' kind
        *({"repetition_penalty": 1e-50}, {"repetition_penalty": 1e39}),
    ],
    ids=lambda wrong: str(wrong)[:40],
)
def test_what_is_no_number_of_its_kind_is_refused(wrong):
    """Where annotations are not checked, as in tests they are."""
    given = SimpleNamespace(**{**asdict(Sampling()), **wrong})
    with pytest.raises(RerouteError, match="expected"):
        Sampling.__post_init__(given)


def test_greedy_answers_compile_nothing_that_draws():
    logits, seen, produced = jnp.zeros((2, 50)), jnp.zeros((2, 50), bool), jnp.zeros(2, jnp.int32)
    greedy, drawn = (
        str(jax.make_jaxpr(choose)(logits, seen, produced, row_sampling(Sampling(temperature=one, top_p=0.9), [0, 1])))
        for one in (0.0, 0.5)
    )
    for operation in ("sort", "random_bits", "cumsum"):
        assert operation in drawn and operation not in greedy
