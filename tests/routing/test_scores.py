"""Scores, floors and counts by hand: section 22's vectors in both frameworks."""

from dataclasses import replace
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert.crosscheck import floors as torch_floors
from convert.crosscheck import scores as torch_scores
from convert.crosscheck.reference import choose as torch_choose
from reroute_jax.config import DecoderConfig
from reroute_jax.nn.attention import query_probabilities
from reroute_jax.nn.layers import Rope
from reroute_jax.routing.cost import cached_per_layer, visual_per_layer
from reroute_jax.routing.floors import RotaryAnchors, StrideGrid, rotary_means, stride_grid
from reroute_jax.routing.ops import Rows, choose, whole_share
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.scores import SCORES, LastLayer, Sight, default_seeds, hidden_change, text_queries
from tests.routing.test_cost import LLAVA_7B, QWEN_7B

compiled_choose = jax.jit(choose, static_argnums=(3, 5))


def rows_of(text_before, visual, text_after, padding=0):
    """One row of tokens without content."""
    index = [-1] * text_before + list(range(visual)) + [-1] * (text_after + padding)
    count = len(index)
    valid = np.arange(count) < count - padding
    index = np.array(index, np.int32)[None]
    slot = np.where(valid, np.arange(count, dtype=np.int32), -1)[None]
    table = np.zeros((1, count, 1), np.float32)
    parts = table, Rope(table, table), slot, index, valid[None], index >= 0
    return Rows(*jax.tree.map(jnp.asarray, parts))


# Vector 22.2: another normaliser than that of section 11.2, and so other shares of each head.
def test_softmax_over_visual_tokens_alone():
    logits = np.array([[0, 1, 2, 0, 1, 0], [1, 0, 0, 3, 0, 1]], np.float32)[:, :, None]
    expected, visual = [0.119965, 0.288882, 0.471189, 0.119965], np.arange(6) % 5 != 0
    ones = np.ones((1, 2, 1, 1), np.float32)
    found = np.asarray(jax.jit(query_probabilities)(ones, logits[None], visual[None, None]))
    np.testing.assert_allclose(found[0, :, 0].mean(axis=0)[1:5], expected, atol=1e-6)
    ones = torch.ones(2, 6, 1)
    np.testing.assert_allclose(
        torch_scores.last_token(ones, torch.tensor(logits), torch.tensor(visual))[1:5], expected, atol=1e-6
    )


VALUES = np.array(
    [
        [(0, 0), (1, 0), (0, 2), (1, 1), (-1, 0), (0, 0), (2, 0), (0, 1), (1, 1)],
        [(0, 0), (0, 1), (1, 0), (0, 0), (1, 1), (0, 0), (1, 0), (-1, 1), (0, 2)],
    ],
    np.float32,
)


# Vector 22.3.
@pytest.mark.parametrize(
    ("name", "seed", "expected"),
    [
        ("value_similarity", 0, [0.310447, 0.240017, 0.246897, 0.202639]),
        ("value_similarity_all_rows", 1, [0.087112, 0.196675, 0.102252, 0.079547]),
    ],
)
def test_value_similarity(name, seed, expected):
    rows = rows_of(1, 4, 4)

    @jax.jit
    def rank(rows, values, one):
        last = LastLayer(rows.hidden, rows.hidden, values)
        ranked = SCORES[name].rank(Sight((), 1, rows, last, None, None, rows.eligible, one, 1, 8, None))
        return ranked.scores[0], ranked.seeds[0]

    ranked, chosen = jax.tree.map(np.asarray, rank(rows, VALUES[None], np.ones(1, np.int32)))
    np.testing.assert_allclose(ranked[1:5], expected, atol=1e-6)
    assert np.flatnonzero(chosen).tolist() == [1 + seed]
    candidates = torch.tensor(np.array(rows.eligible[0]))
    among = candidates if name == "value_similarity" else torch.ones(9, dtype=torch.bool)
    queries = torch_scores.text_queries(torch.arange(9), 5)
    found, seeds = torch_scores.value_similarity(torch.tensor(VALUES), queries, candidates, among, 1)
    np.testing.assert_allclose(found[1:5], expected, atol=1e-6)
    assert (queries.tolist(), seeds.tolist()) == ([7, 8], [1 + seed])


@pytest.mark.parametrize(("behind", "expected"), [(4, [7, 8]), (2, [5, 6]), (1, [5]), (0, [4])])
def test_queries_where_little_text_follows(behind, expected):
    """13.3: from the third token on; all of them; the last token where the image ends the prompt."""
    rows = rows_of(1, 4, behind, padding=2)
    found = np.asarray(jax.jit(text_queries)(rows, np.array([5])))
    assert np.flatnonzero(found).tolist() == expected
    assert torch_scores.text_queries(torch.arange(5 + behind), 5).tolist() == expected


# Vector 22.5.
def test_hidden_change():
    before, after = np.array([(0, 0), (1, 1), (2, 0), (3, 3)]), np.array([(3, 4), (1, 2), (2, 0), (0, -1)])
    before, after = before.astype(np.float32), after.astype(np.float32)
    np.testing.assert_array_equal(jax.jit(hidden_change)(before[None], after[None]), [[5, 1, 0, 5]])
    np.testing.assert_array_equal(torch_scores.hidden_change(torch.tensor(before), torch.tensor(after)), [5, 1, 0, 5])


# Vector 22.6.
def test_stride_grid_and_counts():
    assert np.flatnonzero(stride_grid((6, 6), 3)).tolist() == torch_floors.stride_grid((6, 6), 3) == [0, 3, 18, 21]
    odd = [0, 3, 15, 18, 30, 33]
    assert np.flatnonzero(stride_grid((7, 5), 3)).tolist() == torch_floors.stride_grid((7, 5), 3) == odd
    assert [stride_grid(grid, 3).sum() for grid in ((24, 24), (27, 27), (14, 15))] == [64, 81, 25]
    scores = np.array([0.5 + 0.01 * (7 * i % 36) for i in range(36)], np.float32)
    floor, eligible = stride_grid((6, 6), 3).reshape(1, 36), np.ones((1, 36), bool)
    for held, union, expected in (
        (np.zeros_like(floor), False, [4, 5, 9, 10, 14, 15, 20, 25, 30, 35]),
        (floor, True, [0, 3, 4, 5, 9, 10, 14, 15, 18, 20, 21, 25, 30, 35]),
        (floor, False, [0, 3, 5, 10, 15, 18, 20, 21, 25, 30]),
    ):
        found = np.asarray(compiled_choose(scores[None], eligible, np.array([10]), 14, held, union))
        assert np.flatnonzero(found).tolist() == expected
        assert torch_choose(torch.tensor(scores), torch.tensor(np.array(held[0])), 10, union).tolist() == expected


def test_a_floor_that_is_gone_is_not_kept():
    floor, eligible = np.array([[True, True, False, False]]), np.array([[False, True, True, True]])
    for union, expected in ((False, [1, 3]), (True, [1, 2, 3])):
        found = np.asarray(compiled_choose(np.float32([[9, 0, 1, 2]]), eligible, np.array([2]), 3, floor, union))
        assert np.flatnonzero(found).tolist() == expected


def test_a_share_of_a_number_on_the_device():
    """9 % of 100 is 9, which a float32 product need not reach."""
    assert whole_share(Fraction(9, 100), jnp.array([100, 99, 217, 0])).tolist() == [9, 8, 19, 0]


def anchors(positions, grid, share, config: DecoderConfig):
    floor = RotaryAnchors(share, Fraction(0), of_kept=False)
    found = np.flatnonzero(floor.mask([grid], positions, 0, config)).tolist()
    count = round(share * grid[0] * grid[1])
    assert found == torch_floors.rotary_anchors(torch.tensor(positions), count, config.rope_theta, config.head_dim)
    return found


# Vector 22.4: LLaVA's tokens behind a short and a long text.
COS = {5: [*range(28), 32], 35: [*range(11), *range(13, 18), *range(21, 25), *range(30, 34), 40, 41, 42, 53, 66]}
SIN = {
    5: "141 179 191 222 241 242 279 280 298 323 324 343 373 374 375 398 431 432 433 434 460 461 462 498 499 500 501 "
    "532 533",
    35: "149 192 211 212 249 250 293 294 343 344 345 368 401 402 403 404 430 431 432 469 470 471 502 503 546 547 548 "
    "549 550",
}


@pytest.mark.parametrize("start", [5, 35])
def test_rotary_anchors_of_llava(start):
    found = anchors(np.arange(start, start + 576)[None], (24, 24), Fraction(1, 20), LLAVA_7B)
    assert found == sorted({*COS[start], *map(int, SIN[start].split())})


def mrope(rows, cols, start=15):
    y, x = np.indices((rows, cols)).reshape(2, -1)
    return np.stack([np.full(rows * cols, start), start + y, start + x])


def test_rotary_anchors_of_qwen_tie_as_they_should():
    qwen = replace(QWEN_7B, rope_theta=1e6)
    assert anchors(mrope(4, 6), (4, 6), Fraction(1, 10), qwen) == [3, 4, 5, 21]
    assert len(anchors(mrope(24, 24), (24, 24), Fraction(1, 10), qwen)) == 116
    # One value for each pair of a row and a column in either order: plain fp32 sums have 351.
    cosine, _ = rotary_means(mrope(24, 24), 1e6, 128)
    assert len(np.unique(cosine)) == 24 * 25 // 2


def test_floors_of_several_images_stand_in_each():
    grids, positions = [(4, 4), (2, 3)], np.arange(22)[None]
    assert np.flatnonzero(StrideGrid(3).mask(grids, positions, 0, LLAVA_7B)).tolist() == [0, 3, 12, 15, 16]
    both = RotaryAnchors(Fraction(1, 4), Fraction(0), of_kept=False).mask(grids, positions, 0, LLAVA_7B)
    assert both[:16].any() and both[16:].any()


# Rounding of 13.3: 1 % and more, halves to even.
def test_default_seeds():
    assert [default_seeds(visual) for visual in (0, 36, 150, 250, 576)] == [0, 1, 2, 2, 6]


# Vector 22.10: S = 24 of which 16 are visual, L = 8, one decision at 4 that keeps 6.
@pytest.mark.parametrize(
    ("cut", "lengths"),
    [("no", [24] * 4 + [14] * 4), ("all", [14] * 8), ("all_but_first", [24] + [14] * 7)],
)
def test_lengths_of_cut_caches(cut, lengths):
    schedule = Schedule.from_decisions((4,), (6,), 8, "delete", cut_caches=cut)
    assert [8 + visual for visual in cached_per_layer(schedule, visual_per_layer(schedule, 16))] == lengths
