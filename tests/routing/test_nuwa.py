"""Nuwa stage 1 against section 11's vectors and a float64 reference written from section 4.3."""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reroute_jax.routing import nuwa
from reroute_jax.routing.tower import Tower

compiled = jax.jit(nuwa.stage_one, static_argnames=("cap", "top_n", "quantile", "self_weight_override"))
quantile = jax.jit(nuwa._quantile, static_argnums=2)


def stage_one(
    metric, features, similarity, *, grid, top_n, keep, radius, quantile=0.55, self_weight_override=True, pad=0
):
    """The stage in arrays with `pad` slots of rubbish behind the patches, cut to what it keeps."""
    padded = [np.concatenate([x, np.full((pad, *x.shape[1:]), 7, x.dtype)]) for x in (metric, features, similarity)]
    merged, anchors = compiled(
        *padded,
        np.array(grid),
        np.int32(keep),
        np.float32(radius),
        cap=keep + pad // 2,
        top_n=top_n,
        quantile=Fraction(quantile).limit_denominator(100),
        self_weight_override=self_weight_override,
    )
    merged, anchors = np.asarray(merged), np.asarray(anchors)
    assert (anchors[keep:] == len(padded[0])).all()
    return merged[:keep], anchors[:keep]


def reference(metric, features, similarity, grid, top_n, keep, radius, quantile=0.55, override=True):
    """Section 4.3 and, for odd grids, the padding of 5.3, step by step in float64. Returns merged and anchors."""
    rows, cols = grid
    height, width = rows + rows % 2, cols + cols % 2
    real = np.zeros((height, width), bool)
    real[:rows, :cols] = True

    def padded(values):
        out = np.zeros((height, width, *values.shape[1:]))
        out[:rows, :cols] = np.asarray(values, np.float64).reshape(rows, cols, *values.shape[1:])
        return out.reshape(height * width, *values.shape[1:])

    m, f, g = padded(metric), padded(features), padded(similarity)
    candidates = []
    for ry in range(height // 2):
        for rx in range(width // 2):
            local = [(2 * ry + dy) * width + 2 * rx + dx for dy in (0, 1) for dx in (0, 1)]
            local = [p for p in local if real.reshape(-1)[p]]
            candidates += sorted(local, key=lambda p: -m[p])[:top_n]
    kept = sorted(sorted(sorted(candidates), key=lambda p: -m[p])[:keep])
    g = g / np.maximum(np.linalg.norm(g, axis=1, keepdims=True), 1e-12)
    y, x = np.divmod(np.arange(height * width), width)
    ordered = sorted(m[kept])
    place = quantile * (keep - 1)
    low = int(place)
    threshold = ordered[low] + (place - low) * (ordered[min(low + 1, keep - 1)] - ordered[low])
    merged = []
    for b in kept:
        distance = np.hypot(y - y[b], x - x[b])
        weights = np.maximum(g @ g[b], 0) * (1 - np.minimum(distance / radius, 1))
        if m[b] >= threshold:
            weights = np.where(np.arange(len(m)) == b, weights, 0)
        weights = weights / (weights.sum() + 1e-8)
        if override:
            weights[b] = 1.0
        merged.append(weights @ f)
    anchors = [y[b] * cols + x[b] for b in kept]
    return np.array(merged), np.array(anchors)


# Section 11, vector 6.
SCORES_6 = np.float32([0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.8, 0.6, 0.05, 0.15, 0.35, 0.25, 0.45, 0.12, 0.55, 0.65])
TURN_6 = np.arange(16, dtype=np.float32) * np.float32(np.pi) / 10
CIRCLE_6 = np.float32(np.stack([np.cos(TURN_6), np.sin(TURN_6)], axis=1))
PLANE_6 = np.float32(np.stack([np.arange(16), np.ones(16)], axis=1))


def vector_6(top_n, keep, features=PLANE_6, **more):
    return stage_one(SCORES_6, features, CIRCLE_6, grid=(4, 4), top_n=top_n, keep=keep, radius=8**0.5, **more)


def test_vector_6a():
    merged, anchors = vector_6(1, 3)
    assert anchors.tolist() == [0, 6, 15]
    np.testing.assert_allclose(merged, [[0, 1], [10.3068, 1.7240], [21.7682, 1.5126]], atol=1e-4)
    merged, _ = vector_6(1, 3, self_weight_override=False)
    np.testing.assert_allclose(merged, [[0, 1], [5.9627, 1], [14.0798, 1]], atol=1e-4)


def test_vector_6a_weights():
    merged, _ = vector_6(1, 3, features=np.eye(16, dtype=np.float32))
    expected = np.zeros(16)
    expected[2:11] = [0.0551, 0.0811, 0.0654, 0.1697, 1, 0.1697, 0.0468, 0.0811, 0.0551]
    np.testing.assert_allclose(merged[1], expected, atol=5e-5)
    assert merged[0].tolist() == [1.0] + [0.0] * 15


def test_members_are_all_that_take_part():
    merge, tower = nuwa.NuwaMerge(Fraction(3, 16), 1), Tower()
    tower.metric, tower.similarity = lambda: jnp.asarray(SCORES_6)[None], lambda order: jnp.asarray(CIRCLE_6)[None]
    given = {"grid": jnp.array([[4, 4]]), "keep": jnp.array([3]), "radius": jnp.array([8**0.5])}
    members = np.asarray(jax.jit(lambda given: merge.members(tower, given))(given))[0]
    assert [np.flatnonzero(one).tolist() for one in members[:2]] == [[0], list(range(2, 11))]


def test_vector_6b():
    merged, anchors = vector_6(2, 6)
    assert anchors.tolist() == [0, 5, 6, 7, 14, 15]
    expected = [[0, 1], [8.6573, 1.7240], [6, 1], [11.4699, 1.6316], [22.5428, 1.6622], [15, 1]]
    np.testing.assert_allclose(merged, expected, atol=1e-4)


# Section 11, vector 7.
@pytest.mark.parametrize(("top_n", "keep", "high"), [(1, 112, 50), (2, 224, 101), (3, 336, 151)])
def test_vector_7_high_anchors(top_n, keep, high):
    rng = np.random.default_rng(0)
    metric = np.float32(rng.permutation(576) / 576)
    similarity = np.float32(rng.random((576, 4)) + 0.1)
    merged, anchors = stage_one(
        metric, np.eye(576, dtype=np.float32), similarity, grid=(24, 24), top_n=top_n, keep=keep, radius=280**0.5
    )
    alone = (merged > 0).sum(axis=1) == 1
    assert alone.sum() == high
    own = metric[anchors]
    assert own[alone].min() > own[~alone].max()


# Section 11, vector 9: the same steps on Qwen's odd grid, with its constants and without the overwritten self weight.
@pytest.mark.parametrize(
    ("top_n", "keep", "anchors", "merged"),
    [
        (3, 6, [3, 6, 9, 10, 12, 14], {6: 6.1158}),
        (3, 9, [0, 3, 6, 7, 8, 9, 10, 12, 14], {0: 2.1747}),
        (4, 13, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14], {1: 2.8036, 2: 3.4573}),
    ],
)
def test_vector_9(top_n, keep, anchors, merged):
    scores = np.float32([5, 1, 2, 9, 4, 3, 8, 7, 6, 10, 11, 0.5, 12, 0.25, 13])
    turn = np.arange(15) * np.pi / 16
    plane = np.float32(np.stack([np.arange(15), np.ones(15)], axis=1))
    circle = np.float32(np.stack([np.cos(turn), np.sin(turn)], axis=1))
    out, kept = stage_one(
        scores, plane, circle, grid=(3, 5), top_n=top_n, keep=keep, radius=0.8 * 34**0.5, quantile=0.1,
        self_weight_override=False,
    )  # fmt: skip
    assert kept.tolist() == anchors
    expected = [[merged.get(p, p), 1] for p in anchors]
    np.testing.assert_allclose(out, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("override", "pad"),
    [(True, 13), *(pytest.param(override, 0, marks=pytest.mark.slow) for override in (True, False))],
)
@pytest.mark.parametrize(
    ("grid", "top_n", "keep", "radius"),
    [
        ((24, 24), 1, 112, 280**0.5),
        ((24, 24), 3, 336, 280**0.5),
        ((8, 8), 2, 25, 5.5),
        ((5, 7), 1, 9, 4.0),
        ((7, 4), 4, 28, 3.0),
        ((3, 9), 2, 12, 6.2),
        ((1, 5), 1, 3, 2.0),
        ((6, 6), 2, 1, 2.0),
    ],
)
def test_against_the_reference(grid, top_n, keep, radius, override, pad):
    rng = np.random.default_rng(grid[0] * 100 + top_n)
    count = grid[0] * grid[1]
    metric = rng.random(count).astype(np.float32)
    features, similarity = (rng.normal(size=(count, width)).astype(np.float32) for width in (6, 5))
    merged, anchors = stage_one(
        metric, features, similarity, grid=grid, top_n=top_n, keep=keep,
        radius=radius, self_weight_override=override, pad=pad,
    )  # fmt: skip
    expected, kept = reference(metric, features, similarity, grid, top_n, keep, radius, override=override)
    assert anchors.tolist() == kept.tolist()
    np.testing.assert_allclose(merged, expected, atol=1e-5)


def test_ties_go_to_the_lowest_index():
    _, anchors = stage_one(np.ones(16, np.float32), PLANE_6, CIRCLE_6, grid=(4, 4), top_n=1, keep=3, radius=2.0)
    assert anchors.tolist() == [0, 2, 8]


def test_padded_cells_are_never_kept():
    # Edge regions have one or two real cells, and nothing is below the padding's zero but these.
    metric, ones = -np.arange(1, 10, dtype=np.float32), np.ones((9, 2), np.float32)
    _, anchors = stage_one(metric, ones, ones, grid=(3, 3), top_n=2, keep=7, radius=2.0)
    assert anchors.tolist() == [0, 1, 2, 5, 6, 7, 8]


def test_similarity_of_zero_weighs_nothing():
    similarity = CIRCLE_6.copy()
    similarity[6] = 0
    merged, _ = stage_one(SCORES_6, PLANE_6, similarity, grid=(4, 4), top_n=1, keep=3, radius=8**0.5)
    np.testing.assert_allclose(merged[1], PLANE_6[6], atol=1e-6)


def test_a_batch_of_different_grids():
    rng = np.random.default_rng(3)
    metric, features = rng.random((3, 40)).astype(np.float32), rng.normal(size=(3, 40, 4)).astype(np.float32)
    grids, keeps, radii = [(5, 7), (4, 10), (3, 3)], [11, 13, 2], [3.0, 4.0, 2.0]
    how = {"top_n": 2, "quantile": Fraction(11, 20), "self_weight_override": True}
    batched = jax.jit(jax.vmap(functools.partial(nuwa.stage_one, cap=13, **how)))
    merged, anchors = batched(metric, features, features, jnp.array(grids), jnp.array(keeps), jnp.array(radii))
    for row, (grid, keep, radius) in enumerate(zip(grids, keeps, radii, strict=True)):
        size = grid[0] * grid[1]
        expected, kept = reference(*(x[row, :size] for x in (metric, features, features)), grid, 2, keep, radius)
        assert anchors[row, :keep].tolist() == kept.tolist()
        np.testing.assert_allclose(merged[row, :keep], expected, atol=1e-5)


@pytest.mark.parametrize("count", range(1, 60))
def test_a_whole_quantile_index_is_exact(count):
    values = np.arange(count, dtype=np.float32) * np.float32(0.1)
    place = Fraction(1, 10) * (count - 1)
    padded = np.pad(values, (0, 62 - count), constant_values=np.inf)
    found = quantile(padded, np.int32(count), Fraction(1, 10))
    if place.denominator == 1:
        assert found == values[int(place)]
    assert found == pytest.approx(np.quantile(values.astype(np.float64), 0.1), abs=1e-6)


def test_weights_stay_in_float32_for_half_features():
    rng = np.random.default_rng(4)
    # Metrics that bfloat16 cannot tell apart.
    metric = np.float32(1 + rng.permutation(64) * 1e-4)
    features = rng.normal(size=(64, 8)).astype(jnp.bfloat16)
    merged, anchors = stage_one(metric, features, features, grid=(8, 8), top_n=2, keep=14, radius=5.0)
    expected, kept = reference(metric, features.astype(np.float32), features.astype(np.float32), (8, 8), 2, 14, 5.0)
    assert merged.dtype == jnp.bfloat16
    assert anchors.tolist() == kept.tolist()
    np.testing.assert_allclose(merged.astype(np.float32), expected, atol=0.05)
