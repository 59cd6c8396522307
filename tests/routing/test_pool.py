"""The control that averages neighbouring tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

from reroute_jax.errors import RerouteError
from reroute_jax.routing.pool import average_pool


def reference(features, grid, rows, cols):
    cells = np.asarray(features, np.float64).reshape(*grid, -1)
    out = []
    for r in range(rows):
        for c in range(cols):
            down = slice(r * grid[0] // rows, -(-(r + 1) * grid[0] // rows))
            right = slice(c * grid[1] // cols, -(-(c + 1) * grid[1] // cols))
            out.append(cells[down, right].mean(axis=(0, 1)))
    return np.array(out)


@pytest.mark.parametrize(
    ("grid", "rows", "cols"), [((4, 4), 2, 2), ((24, 24), 11, 11), ((5, 7), 3, 4), ((3, 8), 3, 8), ((6, 1), 4, 1)]
)
def test_against_plain_means(grid, rows, cols):
    features = np.random.default_rng(0).normal(size=(grid[0] * grid[1], 3)).astype(np.float32)
    pooled, centres = average_pool(jnp.array(features), grid, rows, cols)
    np.testing.assert_allclose(pooled, reference(features, grid, rows, cols), atol=1e-6)
    assert (np.diff(centres) > 0).all() and len(centres) == rows * cols


def test_centres():
    def centres(grid, rows, cols):
        return average_pool(jnp.ones((grid[0] * grid[1], 1)), grid, rows, cols)[1].tolist()

    assert centres((6, 6), 2, 2) == [7, 10, 25, 28]
    assert centres((4, 4), 2, 2) == [0, 2, 8, 10]
    assert centres((3, 8), 3, 8) == list(range(24))
    # Columns 0..1, 1..3, 3..4 of five; the lower middle of two.
    assert centres((1, 5), 1, 3) == [0, 2, 3]


def test_sums_in_float32():
    # 256 + 1 is 256 in bfloat16: running sums in it would lose every second addend.
    features = jnp.full((400, 1), 1.0, jnp.bfloat16).at[::2].set(3.0)
    pooled, _ = average_pool(features, (20, 20), 1, 1)
    assert pooled.dtype == jnp.bfloat16
    assert pooled.tolist() == [[2.0]]


def test_refusals():
    with pytest.raises(RerouteError, match="4 x 4 grid to 5 x 2"):
        average_pool(jnp.ones((16, 1)), (4, 4), 5, 2)
    with pytest.raises(RerouteError, match="4 x 4 does not hold 15"):
        average_pool(jnp.ones((15, 1)), (4, 4), 2, 2)
