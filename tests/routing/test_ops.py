"""Selection, compaction and scoring on their own: section 11's vectors 2 and 3, ties, short rows, pads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reroute_jax.nn.attention import query_probabilities
from reroute_jax.nn.layers import Rope
from reroute_jax.routing import ops
from reroute_jax.routing.ops import Rows

select = jax.jit(ops.select, static_argnums=3)
compact_slots, running_counted = (jax.jit(of, static_argnums=1) for of in (ops.compact_slots, ops._running_counted))
best_by_counting, gather, scatter = map(jax.jit, (ops._best_by_counting, ops.gather, ops.scatter))
probabilities = jax.jit(query_probabilities)


def test_vector_2_scores():
    """Two heads, six keys; the given numbers are the scaled logits of the last row."""
    logits = np.array([[0, 1, 2, 0, 1, 0], [1, 0, 0, 3, 0, 1]], np.float32)
    # One head dimension, one query of 1 per head: the key itself is the logit.
    q, k = np.ones((1, 2, 1, 1), np.float32), logits[None, :, :, None]
    scores = np.asarray(probabilities(q, k, np.ones((1, 1, 6), bool))).mean(axis=(1, 2))
    np.testing.assert_allclose(scores[0], [0.079247, 0.103413, 0.250983, 0.383699, 0.103413, 0.079247], atol=1e-6)
    visual = np.array([[False, True, True, True, True, False]])
    for keep, wanted in ((2, [2, 3]), (3, [1, 2, 3])):
        chosen = select(scores, visual, np.array([keep]), keep)
        np.testing.assert_array_equal(np.flatnonzero(chosen[0]), wanted)


def test_padded_keys_take_no_probability():
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=size).astype(np.float32) for size in ((1, 4, 1, 8), (1, 2, 7, 8)))
    short = probabilities(q, k[:, :, :5], np.ones((1, 1, 5), bool))
    padded = np.asarray(probabilities(q, k, np.arange(7)[None, None] < 5))
    np.testing.assert_allclose(padded[..., :5], short, atol=1e-6)
    assert (padded[..., 5:] == 0).all()


@pytest.mark.parametrize("seed", range(20))
def test_select_equals_a_stable_sort(seed):
    """Against numpy: scores with many ties, rows with fewer wanted than the cap, ineligible slots."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 5, (3, 30)).astype(np.float32)
    eligible = rng.random((3, 30)) < 0.7
    keep = np.array([0, 4, 9])
    value = np.where(eligible, scores, -np.float32(np.inf))
    ways = select(scores, eligible, keep, 9), eligible & np.asarray(best_by_counting(value, keep))
    for chosen in map(np.asarray, ways):
        for row in range(3):
            order = sorted(np.flatnonzero(eligible[row]), key=lambda slot: (-scores[row, slot], slot))
            np.testing.assert_array_equal(np.flatnonzero(chosen[row]), sorted(order[: keep[row]]))
        slots = [np.asarray(slots_of(chosen, 12)) for slots_of in (compact_slots, running_counted)]
        for row in range(3):
            wanted = np.flatnonzero(chosen[row])
            np.testing.assert_array_equal(slots[0][row], [*wanted, *range(30, 30 + 12 - len(wanted))])
            np.testing.assert_array_equal(slots[1][row, : len(wanted)], wanted)
            assert (slots[1][row, len(wanted) :] >= 30).all()


def rows_of(hidden, visual, valid=None):
    visual = np.asarray(visual, np.int32)
    valid = np.ones(visual.shape, bool) if valid is None else np.asarray(valid)
    slots = np.broadcast_to(np.arange(visual.shape[1], dtype=np.int32), visual.shape)
    table = slots[..., None].astype(np.float32)
    parts = np.asarray(hidden, np.float32), Rope(table, table), slots, visual, valid, visual >= 0
    return Rows(*jax.tree.map(jnp.asarray, parts))


@pytest.mark.parametrize(
    ("recover", "selected", "final", "cached"),
    [
        (True, [[1, 3, 4], [0, 2]], [6, 4, 3, 4, 3, 3, 1, 6], [{0, 2, 4, 5, 7}, {0, 1, 3, 7}]),
        (False, [[1, 3, 4], [3, 4]], [6, 1, 3, 1, 6, 6, 1, 6], [{0, 2, 4, 5, 7}, {0, 4, 5, 7}]),
    ],
)
def test_vector_3_reroute_and_delete(recover, selected, final, cached):
    """Six layers that add one to every row they process; decisions at layers 1 and 3 with given scores."""
    visual = [[-1, 0, 1, 2, 3, 4, 5, -1]]
    rows = rows_of(np.ones((1, 8, 1)), visual)  # layer 0 has run
    ends = {int(v): None for v in range(8)}
    for given, keep, layers in (([0.1, 0.6, 0.2, 0.5, 0.4, 0.3], 3, 2), ([0.9, 0.1, 0.8, 0.2, 0.3, 0.0], 2, 3)):
        visual = np.asarray(rows.visual)
        scores = np.float32(given)[np.maximum(visual, 0)]
        chosen = np.asarray(select(scores, rows.eligible, np.array([keep]), keep))
        slots = compact_slots(chosen | (visual < 0), 2 + keep)
        active = gather(rows, slots)
        stage = 0 if layers == 2 else 1
        found = np.asarray(active.visual)[0]
        assert found[found >= 0].tolist() == selected[stage]
        origin = np.asarray(active.rope.cos)[0, :, 0].astype(int)  # the table carries the original index
        assert set(origin) == cached[stage]
        active.hidden = jnp.asarray(np.asarray(active.hidden) + layers)
        if not recover:
            gone = set(np.asarray(rows.rope.cos)[0, :, 0].astype(int)) - set(origin)
            for slot, value in zip(
                np.asarray(rows.rope.cos)[0, :, 0].astype(int), np.asarray(rows.hidden)[0, :, 0], strict=True
            ):
                if slot in gone:
                    ends[slot] = int(value)
        rows = scatter(rows, slots, active) if recover else active
    for slot, value in zip(
        np.asarray(rows.rope.cos)[0, :, 0].astype(int), np.asarray(rows.hidden)[0, :, 0], strict=True
    ):
        ends[slot] = int(value)
    assert list(ends.values()) == final


def test_gather_keeps_rows_right_padded():
    rows = rows_of(
        np.arange(12).reshape(2, 6, 1),
        [[-1, 0, 1, 2, -1, -1], [-1, 0, -1, -1, -1, -1]],
        [[True] * 6, [True, True, True, False, False, False]],
    )
    running = np.array([[True, False, True, False, True, True], [True, True, True, False, False, False]])
    found = gather(rows, compact_slots(running, 5))
    np.testing.assert_array_equal(found.valid, [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(np.asarray(found.hidden)[..., 0], [[0, 2, 4, 5, 0], [6, 7, 8, 0, 0]])
    np.testing.assert_array_equal(found.visual, [[-1, 1, -1, -1, -1], [-1, 0, -1, -1, -1]])
    np.testing.assert_array_equal(found.last, [3, 2])
