"""Keys and values in 8 bits: how far they are off, and that attention reads what they stand for."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from reroute_jax.nn.attention import cached_attention
from reroute_jax.nn.cache import ROOM, Int8Rows, KVCache, StageCache, grown, int8_rows, token_bytes, write_slots
from reroute_jax.routing.ops import gather_keys
from tests.routing.test_cost import QWEN_7B

B, K, S, H = 2, 2, 9, 8


def rows(seed, heads=K, slots=S, dtype=jnp.float32):
    """Numbers whose size varies from row to row by a factor of a thousand."""
    rng = np.random.default_rng(seed)
    sizes = 10 ** rng.uniform(-2, 1, (B, heads, slots, 1))
    return jnp.asarray((sizes * rng.standard_normal((B, heads, slots, H))).astype(dtype))


def plain(held):
    return np.asarray(held.numbers, np.float32) * np.asarray(held.scales)[..., None]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_no_number_is_off_by_more_than_half_a_scale(dtype):
    """Of 255 levels from minus to plus the largest number of a token and head, 1/254 of that."""
    exact = np.asarray(rows(0, dtype=dtype), np.float32)
    held = int8_rows(jnp.asarray(exact, dtype))
    assert held.numbers.dtype == jnp.int8 and held.scales.dtype == jnp.float32
    largest = np.abs(exact).max(axis=-1, keepdims=True)
    assert (np.abs(plain(held) - exact) <= 1.0001 * largest / 254).all()
    assert (np.abs(np.asarray(held.numbers)).max(axis=-1) == 127).all()


def test_a_row_of_zeros_is_zeros():
    held = int8_rows(jnp.zeros((B, K, S, H)))
    np.testing.assert_array_equal(plain(held), 0)
    assert (held.scales > 0).all()


@pytest.mark.parametrize(("dtype", "off"), [("float32", 1e-6), ("bfloat16", 2e-2), ("float16", 2e-3)])
@pytest.mark.parametrize("size", [1, 1e-5])
def test_attention_reads_what_the_numbers_stand_for(dtype, off, size):
    """Grouped queries on rows of 9 and 4 tokens. Off by no more than the dtype itself, and in fp16 too where values are
    small: weights times scales would leave its range."""
    q, k, v = rows(1, heads=4, slots=1).astype(dtype), int8_rows(rows(2)), int8_rows(size * rows(3))
    visible = jnp.arange(S) < jnp.array([9, 4])[:, None]
    empty = jnp.where(visible[:, None], k.scales, 0)  # as room behind a prompt is
    found = cached_attention(q, replace(k, scales=empty), v, visible)
    assert found.dtype == dtype
    wide = [jnp.asarray(one, jnp.float32) for one in (q, plain(k), plain(v))]
    expected = np.asarray(cached_attention(*wide, visible))
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=off * np.abs(expected).max())


def cache_of(kind, exact):
    length = jnp.array([S, 4])
    return KVCache((StageCache.of(((exact,), (exact,)), kind, length, length),))


def test_room_growth_writing_and_gathering_leave_the_rows_as_they_are():
    exact, new = rows(4), rows(5, slots=1)
    cache = cache_of("int8", exact)
    (stage,) = grown(cache, ROOM).stages
    held, same = stage.keys[0], plain(int8_rows(exact))
    assert held.shape == (B, K, S + 2 * ROOM, H) and held.scales.shape == held.shape[:3]
    np.testing.assert_array_equal(plain(held)[:, :, :S], same)
    written = plain(write_slots(held, new, jnp.array([S, 4])))
    for row, slot in enumerate((S, 4)):
        np.testing.assert_array_equal(written[row, :, slot], plain(int8_rows(new))[row, :, 0])
        others = np.arange(S) != slot
        np.testing.assert_array_equal(written[row, :, :S][:, others], same[row, :, others].swapaxes(0, 1))
    taken = gather_keys(held, jnp.array([[2, 5, S + 2 * ROOM], [0, 3, 1]]))
    assert isinstance(taken, Int8Rows)
    np.testing.assert_array_equal(plain(taken)[0], np.pad(same[0, :, [2, 5]].swapaxes(0, 1), ((0, 0), (0, 1), (0, 0))))
    np.testing.assert_array_equal(plain(taken)[1], same[1, :, [0, 3, 1]].swapaxes(0, 1))


def test_bytes_are_those_of_numbers_and_scales():
    config = replace(QWEN_7B, num_kv_heads=K, head_dim=H)
    for kind, dtype, each in (("int8", "bfloat16", H + 4), (None, "bfloat16", 2 * H), (None, "float32", 4 * H)):
        cache = cache_of(kind, rows(6, dtype=dtype))
        one = token_bytes(replace(config, kv_cache=kind), dtype)
        assert one == 2 * K * each and cache.nbytes == B * (S + ROOM) * one
    assert token_bytes(replace(QWEN_7B, kv_cache="int8"), "bfloat16") == 1056  # of 2048
