"""The control that averages neighbouring tokens."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from reroute_jax.errors import RerouteError
from reroute_jax.routing.merge import merge_arrays, reduced
from reroute_jax.routing.pool import PoolMerge, pool_weights
from reroute_jax.routing.tower import Tower


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
    weights, centres = pool_weights(grid, (rows, cols))
    np.testing.assert_allclose(weights @ features, reference(features, grid, rows, cols), atol=1e-6)
    assert (np.diff(centres) > 0).all() and len(centres) == rows * cols


def test_centres():
    def centres(grid, rows, cols):
        return pool_weights(grid, (rows, cols))[1].tolist()

    assert centres((6, 6), 2, 2) == [7, 10, 25, 28]
    assert centres((4, 4), 2, 2) == [0, 2, 8, 10]
    assert centres((3, 8), 3, 8) == list(range(24))
    # Columns 0..1, 1..3, 3..4 of five; the lower middle of two.
    assert centres((1, 5), 1, 3) == [0, 2, 3]


class Given(Tower):
    """A tower whose features are at decoder width."""

    def __init__(self, features):
        self.features = lambda: features
        self.project = lambda same: same


def test_a_batch_of_different_grids():
    """Cells of each image, whatever stands in the slots behind its tokens."""
    merge, grids = PoolMerge(Fraction(1, 4)), [(6, 6), (4, 10)]
    features = np.random.default_rng(0).normal(size=(3, 40, 2)).astype(np.float32)
    found, centres = reduced(merge, Given(jnp.array(features)), merge_arrays(merge, grids, 3, 40))
    assert found.shape == (3, 10, 2)
    for image, (grid, cells) in enumerate(zip(grids, [(3, 3), (2, 5)], strict=True)):
        size, left = grid[0] * grid[1], cells[0] * cells[1]
        assert merge.anchors(size, grid) == left
        np.testing.assert_allclose(found[image, :left], reference(features[image, :size], grid, *cells), atol=1e-6)
        assert centres[image, :left].tolist() == pool_weights(grid, cells)[1].tolist()


def test_sums_in_float32():
    # 256 + 1 is 256 in bfloat16: running sums in it would lose every second addend.
    features = jnp.full((1, 400, 1), 1.0, jnp.bfloat16).at[:, ::2].set(3.0)
    merge = PoolMerge(Fraction(1, 400))
    found, _ = reduced(merge, Given(features), merge_arrays(merge, [(20, 20)], 1, 400))
    assert found.dtype == jnp.bfloat16
    assert found.tolist() == [[[2.0]]]


def test_refusals():
    with pytest.raises(RerouteError, match="4 x 4 does not hold 15"):
        PoolMerge(Fraction(1, 4)).anchors(15, (4, 4))
    with pytest.raises(RerouteError, match="share of 0"):
        PoolMerge(Fraction(0))
