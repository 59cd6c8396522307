"""Attention against NumPy in every form it takes, by the target of the lowering, and what it holds in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from reroute_jax.nn import attention as module
from reroute_jax.nn.attention import attention, query_probabilities, received_attention

SLOTS = 300


def qkv(seed=0, heads=4, kv_heads=2, slots=SLOTS, dim=8, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal((2, n, slots, dim)).astype(dtype)) for n in (heads, kv_heads, kv_heads)]


def weights(q, k, seen):
    """fp64 `[B, N, T, S]`."""
    k = np.repeat(np.asarray(k, np.float64), q.shape[1] // k.shape[1], axis=1)
    logits = np.einsum("BNTH,BNSH->BNTS", np.asarray(q, np.float64), k) * q.shape[-1] ** -0.5
    found = np.exp(np.where(seen[:, None], logits, -np.inf))
    return found / found.sum(axis=-1, keepdims=True)


def by_hand(q, k, v, seen):
    v = np.repeat(np.asarray(v, np.float64), q.shape[1] // v.shape[1], axis=1)
    return np.einsum("BNTS,BNSH->BNTH", weights(q, k, seen), v)


@pytest.fixture(params=[1024, 100], ids=["at-once", "in-blocks"])
def long(request, monkeypatch):
    monkeypatch.setattr(module, "LONG", request.param)
    monkeypatch.setattr(module, "TRIANGLE_BLOCKS", 2 if request.param == 100 else 16)


@pytest.mark.parametrize("kind", ["whole", "lengths", "causal", "causal-lengths", "mask", "mask-of-keys"])
def test_equals_the_formula(kind, long):
    q, k, v = qkv()
    lengths = np.array([SLOTS, 170])
    real = np.arange(SLOTS) < lengths[:, None]
    triangle = np.tril(np.ones((SLOTS, SLOTS), bool))[None]
    odd = np.random.default_rng(0).random((2, SLOTS, SLOTS)) < 0.4
    odd[..., 0] = True
    seen, given = {
        "whole": (np.ones_like(odd), {}),
        "lengths": (np.broadcast_to(real[:, None], odd.shape), {"lengths": jnp.asarray(lengths)}),
        "causal": (np.broadcast_to(triangle, odd.shape), {"causal": True}),
        "causal-lengths": (np.broadcast_to(triangle, odd.shape), {"causal": True, "lengths": jnp.asarray(lengths)}),
        "mask": (odd, {"mask": jnp.asarray(odd)}),
        "mask-of-keys": (np.broadcast_to(odd[:, 7:8], odd.shape), {"mask": jnp.asarray(odd[:, 7:8])}),
    }[kind]
    found = jax.jit(lambda q, k, v: attention(q, k, v, **given))(q, k, v)
    rows = slice(None) if "lengths" not in given else slice(0, 170)  # what padding sees means nothing
    np.testing.assert_allclose(found[:, :, rows], by_hand(q, k, v, seen)[:, :, rows], atol=1e-5)


def test_received():
    q, k, _ = qkv(kv_heads=4)
    lengths = np.array([SLOTS, 170])
    real = np.arange(SLOTS) < lengths[:, None]
    expected = np.where(real[:, None, :, None], weights(q, k, np.repeat(real[:, None], SLOTS, 1)), 0)
    expected = expected.sum(axis=2).mean(axis=1)
    found = jax.jit(received_attention)(q, k, lengths)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("function", ["whole", "received"])
def test_memory_is_linear_in_the_patches(function):
    """Whole-image attention at 2, 4 and 16 thousand patches, by the compiler's account: a third of the logits of one
    head of the largest would already be 360 MB."""

    def seen(q, k, v, lengths):
        return attention(q, k, v, lengths=lengths) if function == "whole" else received_attention(q, k, lengths)

    def temporary(slots):
        x = jax.ShapeDtypeStruct((1, 4, slots, 16), jnp.float32)
        lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
        return jax.jit(seen).lower(x, x, x, lengths).compile().memory_analysis().temp_size_in_bytes

    small, middle, large = (temporary(slots) for slots in (2048, 4096, 16384))
    assert middle < 2.2 * small and large < 4.4 * middle


@pytest.fixture
def cudnn(monkeypatch):
    """As if cuDNN were here: what it takes to trace and lower for it, not to compile."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    module._cudnn_takes.cache_clear()
    yield
    module._cudnn_takes.cache_clear()


def lowered(platform, dtype, dim=8, **given):
    lengths = jnp.array([SLOTS, 170], jnp.int32)
    traced = jax.jit(lambda q, k, v: attention(q, k, v, lengths=lengths, **given)).trace(*qkv(dtype=dtype, dim=dim))
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_gpu_takes_cudnn_for_16_bits(cudnn, causal, dtype):
    text = lowered("cuda", dtype, causal=causal)
    assert text.count("__cudnn$fmhaSoftmax") == 1 and "stablehlo.exponential" not in text
    assert f"mask_type\\22: \\22{'PADDING_CAUSAL' if causal else 'PADDING'}\\22" in text
    for platform in ("cpu", "tpu"):
        text = lowered(platform, dtype, causal=causal)
        assert "cudnn" not in text and "stablehlo.exponential" in text


def test_xla_stands_behind_cudnn_and_the_log_says_so(cudnn, caplog):
    caplog.set_level("INFO", "reroute_jax")
    assert "cudnn" not in lowered("cuda", "float32", causal=True)
    assert caplog.messages == []
    assert "cudnn" not in lowered("cuda", "bfloat16", dim=12, causal=True)
    (message,) = caplog.messages
    assert "XLA, because of cuDNN" in message and "multiple of 8" in message and "[2, 4, 300, 12]" in message
    lowered("cuda", "bfloat16", causal=True)
    assert caplog.messages[1].endswith("on a CUDA GPU: cuDNN")


def test_without_cudnn_a_gpu_takes_xla():
    module._cudnn_takes.cache_clear()
    assert "cudnn" not in lowered("cuda", "bfloat16", causal=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_scores_are_made_of_is_fp32_in_half_precision(dtype):
    """From the product on: rounding a logit or a probability to 16 bits would cost 100 times this much."""
    q, k, _ = qkv(slots=40, dtype=dtype)
    found = query_probabilities(q[:, :, -1:], k, jnp.ones((2, 1, 40), bool))
    expected = weights(q[:, :, -1:], k, np.ones((2, 1, 40), bool))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
