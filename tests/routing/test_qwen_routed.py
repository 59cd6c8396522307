"""Routed Qwen2.5-VL against the eager torch reference, which takes one sample at a time and really removes or bypasses
tokens; rows with images of different sizes in one batch."""

import zlib
from functools import cache

import numpy as np
import pytest

from convert.crosscheck.reference import run
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.prior import prior_scores
from tests.checkpoints import LAYERS, qwen_pair
from tests.tiny_qwen import random_ids, random_patches

BUDGET = 128
NEW = 6
ROUTES = {
    "fastv-delete": {"method": "fastv", "action": "delete"},
    "fastv-reroute": {"method": "fastv", "action": "reroute"},
    "fastv-previous": {"method": "fastv", "action": "delete", "score_source": "previous_layer"},
    "pdrop-delete": {"method": "pdrop", "action": "delete"},
    "pdrop-reroute": {"method": "pdrop", "action": "reroute"},
    "pdrop-every": {"method": "pdrop", "action": "reroute", "decisions": "every"},
    "pdrop-renumber": {"method": "pdrop", "action": "delete", "position_mode": "renumber"},
    "pdrop-reroute-renumber": {"method": "pdrop", "action": "reroute", "position_mode": "renumber"},
    "pdrop-first-image": {"method": "pdrop", "action": "reroute", "first_image_only": True},
    "nuwa-delete": {"method": "nuwa", "action": "delete"},
    "nuwa-reroute": {"method": "nuwa", "action": "reroute"},
    "nuwa-host": {"method": "nuwa", "action": "reroute", "nuwa_first_score": "host"},
    "nuwa-flat": {"method": "nuwa", "action": "reroute", "variant": "flat"},
    "nuwa-pyramid": {"method": "nuwa", "action": "reroute", "variant": "pyramid"},
    "nuwa-0.25-delete": {"method": "nuwa", "action": "delete", "keep_ratio": 0.25},
    "nuwa-0.5-delete": {"method": "nuwa", "action": "delete", "keep_ratio": 0.5},
    "nuwa-0.75-delete": {"method": "nuwa", "action": "delete", "keep_ratio": 0.75},
    "nuwa-0.5-reroute": {"method": "nuwa", "action": "reroute", "keep_ratio": 0.5},
    "nuwa-window-order": {"method": "nuwa", "action": "delete", "keep_ratio": 0.25, "qwen_sim_order": "window"},
    "nuwa-bidirectional": {"method": "nuwa", "action": "delete", "keep_ratio": 0.5, "qwen_layer14_causal": False},
    "nuwa-first-image": {"method": "nuwa", "action": "delete", "keep_ratio": 0.5, "first_image_only": True},
    "random-delete": {"method": "random", "action": "delete"},
    "random-reroute": {"method": "random", "action": "reroute", "seed": 3},
    "uniform": {"method": "uniform", "action": "delete"},
    "pool": {"method": "pool"},
    "layout": {"method": "layout"},
    "divprune": {"method": "divprune"},
    "hiprune": {"method": "hiprune"},
    "visionzip": {"method": "visionzip"},
    "feather": {"method": "feather", "action": "delete"},
    "v2drop": {"method": "v2drop", "action": "delete"},
    "ivc": {"method": "ivc", "action": "delete"},
    "ivc-reroute": {"method": "ivc", "action": "reroute"},
}
EDGES = {
    "layer-0": Schedule.from_decisions((0, 3), (0.5, 0.25), LAYERS, "reroute"),
    "last-layer": Schedule.from_decisions((2, LAYERS - 1), (9, 4), LAYERS, "delete"),
    "keep-all": Schedule.from_decisions((2, 4), (1.0, 1.0), LAYERS, "reroute"),
}
# Generation compiles twice more; routes that differ in scores only are left out of it.
GENERATED = {
    "fastv-delete",
    "pdrop-reroute",
    "pdrop-renumber",
    "pdrop-first-image",
    "nuwa-delete",
    "nuwa-0.5-reroute",
    "ivc",
}
GENERATED |= {"ivc", "random-reroute", "pool", "layer-0"}

# A row with one image, one with two, one with a small one, one without: a batch. Then one that is long: attention goes
# in blocks, and errors of rope grow with the distance.
GRIDS = (((7, 5),), ((5, 6), (9, 3)), ((3, 4),), (), ((7, 5),))
LENGTHS, STARTS = (98, 120, 60, 40, 320), (6, 0, 20, 0, 6)
BATCH, LONG = range(4), 4
ROWS = [
    random_ids(size, grids, start=start, seed=size) for size, grids, start in zip(LENGTHS, GRIDS, STARTS, strict=True)
]
PIXELS = [
    random_patches(grids, seed=len(ids)) if grids else (None, None) for ids, grids in zip(ROWS, GRIDS, strict=True)
]


@cache
def schedule_of(name):
    if name in EDGES:
        return EDGES[name]
    route = ROUTES[name]
    # Half of the tokens and not a ninth: of 12 visual tokens there must be something to choose.
    more = {} if "keep_ratio" in route else {"budget": {"nuwa": BUDGET, "feather": 192}.get(route["method"], 0.4)}
    return qwen_pair()[1].plan(**route, **more)


@cache
def expected(name, row):
    """The reference's run of one row by itself."""
    schedule, ids, grids = schedule_of(name), ROWS[row], GRIDS[row]
    prior = None
    if schedule.prior is not None and grids:
        prior = prior_scores(schedule, grids, zlib.crc32(ids.astype(np.int64).tobytes()))
    pixels, thw = PIXELS[row]
    return run(qwen_pair()[0], ids, pixels, schedule, image_grid_thw=thw, prior=prior, max_new_tokens=NEW)


def batch(rows):
    """Left-padded inputs; padding slots hold an id that must not matter."""
    width = max(len(ROWS[row]) for row in rows)
    ids, mask = np.full((len(rows), width), 9), np.zeros((len(rows), width), int)
    for number, row in enumerate(rows):
        ids[number, width - len(ROWS[row]) :], mask[number, width - len(ROWS[row]) :] = ROWS[row], 1
    found = [PIXELS[row] for row in rows if GRIDS[row]]
    pixels, thw = (np.concatenate(part) for part in zip(*found, strict=True)) if found else (None, None)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_grid_thw": thw}


@pytest.mark.parametrize("name", [*ROUTES, *EDGES])
def test_equals_the_reference(name):
    """Selections, scores, anchors, cached rows, logits and greedy tokens; each row of a ragged batch as if alone."""
    _, model = qwen_pair()
    schedule, rows = schedule_of(name), BATCH
    given = batch(rows)
    result = model.prefill(**given, schedule=schedule, trace=True)
    for row in rows:
        check(result, row, expected(name, row), row)
    if name in GENERATED:
        tokens = model.generate_ids(**given, schedule=schedule, max_new_tokens=NEW)
        np.testing.assert_array_equal(tokens, [expected(name, row).tokens for row in rows])


def check(result, row, wanted, source):
    np.testing.assert_allclose(result.logits[row], wanted.logits, atol=1e-4)
    np.testing.assert_array_equal(result.trace.kv_tokens[row], [len(ran) for ran in wanted.ran])
    if wanted.anchors is not None:
        found = result.trace.anchors[row]
        np.testing.assert_array_equal(found[found >= 0], wanted.anchors)
    count = sum(rows * cols for rows, cols in GRIDS[source])
    assert len(wanted.decisions) == (len(result.trace.selected) if count else 0)
    for number, selected in enumerate(result.trace.selected):
        decision = wanted.decisions[number] if count else None
        np.testing.assert_array_equal(selected[row][selected[row] >= 0], decision.selected if decision else [])
        scores = result.trace.scores[number][row]
        assert not np.isfinite(scores[count:]).any()
        if decision:
            np.testing.assert_allclose(scores[:count], decision.scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "row"), [("pdrop-reroute", LONG), ("nuwa-0.5-delete", 1), ("random-reroute", 2)])
def test_a_row_alone_in_its_own_bucket(name, row):
    """Other shapes are compiled than in the batch; nothing may depend on them."""
    _, model = qwen_pair()
    result = model.prefill(**batch([row]), schedule=schedule_of(name), trace=True)
    check(result, 0, expected(name, row), row)


def test_the_defects_of_the_release_change_the_answer():
    """A switch that changed nothing would be compared with a reference that ignores it too."""
    logits = {name: expected(name, 0).logits for name in ("nuwa-0.25-delete", "nuwa-window-order")}
    assert np.abs(logits["nuwa-0.25-delete"] - logits["nuwa-window-order"]).max() > 1e-2
    logits = {name: expected(name, 0).logits for name in ("nuwa-0.5-delete", "nuwa-bidirectional")}
    assert np.abs(logits["nuwa-0.5-delete"] - logits["nuwa-bidirectional"]).max() > 1e-2


def test_first_image_only_routes_less():
    selected = [
        [len(decision.selected) for decision in expected(name, 1).decisions]
        for name in ("pdrop-reroute", "pdrop-first-image")
    ]
    assert all(both > first for both, first in zip(*selected, strict=True))


def test_one_decision_deletes_as_it_reroutes():
    _, model = qwen_pair()
    found = [
        model.prefill(**batch(BATCH), schedule=Schedule.from_decisions((3,), (0.3,), LAYERS, action), trace=True)
        for action in ("delete", "reroute")
    ]
    np.testing.assert_allclose(found[0].logits, found[1].logits, atol=1e-5)
    np.testing.assert_array_equal(found[0].trace.kv_tokens, found[1].trace.kv_tokens)


def test_text_alone_runs_the_unrouted_plan():
    """The smallest bucket of visual tokens is no reason to score, gather and scatter."""
    _, model = qwen_pair()
    for name in ("pdrop-reroute", "nuwa-delete", "random-reroute"):
        batch = model.inputs(input_ids=ROWS[3][None], schedule=schedule_of(name))
        assert [(stage.lo, stage.hi, stage.cap) for stage in batch.plan.stages] == [(0, LAYERS, None)]
        assert batch.prompt.ids.shape == (1, batch.prompt.text_slots)
