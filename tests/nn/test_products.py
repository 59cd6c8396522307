"""Every form of the product against NumPy, in each dtype and at both sides of every switch."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reroute_jax.nn.products import FEW_ROWS, _plain, matmul

SHAPES = ((1,), (2,), (FEW_ROWS,), (FEW_ROWS + 1,), (3, 1), (2, 5, 40))


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        *product((jnp.float32, jnp.bfloat16), SHAPES),
        *product((jnp.float16,), SHAPES[2:4]),
        *(pytest.param(jnp.float16, shape, marks=pytest.mark.slow) for shape in (*SHAPES[:2], *SHAPES[4:])),
    ],
)
def test_product(dtype, shape):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((*shape, 48)), dtype)
    kernel = jnp.asarray(rng.standard_normal((32, 48)), dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64).T
    # About one unit in the last place of the largest values, which lie between 16 and 32.
    tolerance = {"float32": 1e-5, "float16": 0.02, "bfloat16": 0.13}[jnp.dtype(dtype).name]
    elsewhere = _plain(x.reshape(-1, 48), kernel, None).reshape(*shape, 32)
    for found in (matmul(x, kernel), jax.jit(matmul)(x, kernel), elsewhere):
        assert found.shape == (*shape, 32) and found.dtype == dtype
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance)
    wide = jax.jit(lambda x, kernel: matmul(x, kernel, jnp.float32))(x, kernel)
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(wide, np.float64), expected, atol=1e-4)


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
def test_gradients(rows):
    rng = np.random.default_rng(1)
    x, kernel, seed = (rng.standard_normal(size, np.float32) for size in ((rows, 6), (4, 6), (rows, 4)))
    of_x, of_kernel = jax.grad(lambda x, kernel: (matmul(x, kernel) * seed).sum(), argnums=(0, 1))(x, kernel)
    np.testing.assert_allclose(of_x, seed @ kernel, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(of_kernel, seed.T @ x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_choice_of_a_form_leaves_nothing_in_the_program(dtype):
    x, kernel = jnp.ones((2, 8), dtype), jnp.ones((6, 8), dtype)
    assert "conditional(" not in jax.jit(matmul).lower(x, kernel).compile().as_text()
