"""What the compiler makes of 16-bit weights on the CPU."""

import jax
import jax.numpy as jnp

from reroute_jax.engine.compilation import compiled

WEIGHTS = [jnp.ones((512, 512), jnp.bfloat16)] * 8


def layers(weights, x):
    for weight in weights:
        x = jnp.tanh(x @ weight)
    return x


def loop(weights, x):
    return jax.lax.fori_loop(0, x.shape[0], lambda step, x: layers(weights, x), x)


def temporary_bytes(function, rows):
    x = jnp.ones((rows, 512), jnp.bfloat16)
    return compiled()(function).jitted().lower(WEIGHTS, x).compile().memory_analysis().temp_size_in_bytes


def test_no_copy_of_all_weights_in_float32():
    """As in a prefill and in the decode loop: eight layers in fp32 are 8.4 MB, one is 1.0."""
    assert temporary_bytes(layers, 16) < 3e6
    assert temporary_bytes(loop, 4) < 3e6


def test_one_jitted_function_for_all_calls():
    double = compiled(static_argnames="times")(lambda x, times: x * times)
    assert double(jnp.ones(2), times=3).tolist() == [3, 3]
    assert double(jnp.ones(2), times=3).tolist() == [3, 3]
    assert double.jitted() is double.jitted() and double.jitted()._cache_size() == 1
