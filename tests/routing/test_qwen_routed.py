"""Routed Qwen2.5-VL against the eager torch reference, which takes one sample at a time and really removes or bypasses
tokens; rows with images of different sizes in one batch."""

from functools import cache

import numpy as np
import pytest

from reroute_jax.routing.plan import Schedule
from tests.checkpoints import LAYERS, qwen_pair
from tests.marks import cases
from tests.ragged import RaggedPrompts, reference

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
    "downsample": {"method": "downsample"},
    "downsample-blur": {"method": "downsample", "blur": True},
    "layout": {"method": "layout"},
    "divprune": {"method": "divprune"},
    "hiprune": {"method": "hiprune"},
    "visionzip": {"method": "visionzip"},
    "feather": {"method": "feather", "action": "delete"},
    "v2drop": {"method": "v2drop", "action": "delete"},
    "ivc": {"method": "ivc", "action": "delete"},
    "swiftvlm": {"method": "swiftvlm"},
    "pdrop-mean-offset": {"method": "pdrop", "action": "reroute", "repair": "mean_offset"},
    "ivc-reroute": {"method": "ivc", "action": "reroute"},
}
EDGES = {
    "layer-0": Schedule.from_decisions((0, 3), (0.5, 0.25), LAYERS, "reroute"),
    "last-layer": Schedule.from_decisions((2, LAYERS - 1), (9, 4), LAYERS, "delete"),
    "keep-all": Schedule.from_decisions((2, 4), (1.0, 1.0), LAYERS, "reroute"),
}
# Generation compiles twice more; routes that differ in scores only are left out of it.
GENERATED = {"fastv-delete", "pdrop-reroute", "pdrop-renumber", "nuwa-delete", "nuwa-0.5-reroute", "ivc-reroute"}
GENERATED |= {"swiftvlm", "random-reroute", "pool", "downsample", "layer-0"}
# Of what does not depend on the family, one route a kind is enough; LLaVA's are all there.
SLOW = {"fastv-reroute", "fastv-previous", "pdrop-delete", "pdrop-every", "pdrop-reroute-renumber", "nuwa-reroute"}
SLOW |= {"nuwa-host", "nuwa-flat", "nuwa-pyramid", "nuwa-0.75-delete", "random-delete", "uniform", "layout", "v2drop"}
SLOW |= {"fastv-delete", "pdrop-renumber", "nuwa-delete", "swiftvlm", "feather", "divprune", "visionzip"}
SLOW |= {"pdrop-mean-offset", "downsample", "downsample-blur", "nuwa-first-image", "random-reroute"}
SLOW |= {"ivc-reroute", "last-layer", "keep-all", "nuwa-0.25-delete", "nuwa-0.5-delete", "pool", "hiprune"}
SLOW |= {"layer-0", "nuwa-0.5-reroute"}

# A row with one image, one with two, one with a small one, one without: a batch. Then one that is long: attention goes
# in blocks, and errors of rope grow with the distance.
BATCH, LONG = range(4), 4
ROWS = RaggedPrompts(
    qwen_pair,
    grids=(((7, 5),), ((5, 6), (9, 3)), ((3, 4),), (), ((7, 5),)),
    lengths=(98, 120, 60, 40, 320),
    starts=(6, 0, 20, 0, 6),
    new=NEW,
)


@cache
def schedule_of(name):
    if name in EDGES:
        return EDGES[name]
    route = ROUTES[name]
    # Half of the tokens and not a ninth: of 12 visual tokens there must be something to choose.
    more = {} if "keep_ratio" in route else {"budget": {"nuwa": BUDGET, "feather": 192}.get(route["method"], 0.4)}
    return qwen_pair()[1].plan(**route, **more)


def expected(name, row):
    return reference(ROWS, schedule_of(name), row)


@pytest.mark.parametrize("name", cases([*ROUTES, *EDGES], SLOW))
def test_equals_the_reference(name):
    """Selections, scores, anchors, cached rows, logits and greedy tokens; each row of a ragged batch as if alone."""
    _, model = qwen_pair()
    schedule, rows = schedule_of(name), BATCH
    given = ROWS.batch(rows)
    result = model.prefill(**given, schedule=schedule, trace=True)
    for row in rows:
        ROWS.check(result, row, row, schedule)
    if name in GENERATED:
        tokens = model.generate_ids(**given, schedule=schedule, max_new_tokens=NEW)
        np.testing.assert_array_equal(tokens, [expected(name, row).tokens for row in rows])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "row"), [("pdrop-reroute", LONG), ("nuwa-0.5-delete", 1), ("random-reroute", 2)])
def test_a_row_alone_in_its_own_bucket(name, row):
    """Other shapes are compiled than in the batch; nothing may depend on them."""
    _, model = qwen_pair()
    schedule = schedule_of(name)
    result = model.prefill(**ROWS.batch([row]), schedule=schedule, trace=True)
    ROWS.check(result, 0, row, schedule)


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


@pytest.mark.slow
def test_one_decision_deletes_as_it_reroutes():
    _, model = qwen_pair()
    found = [
        model.prefill(**ROWS.batch(BATCH), schedule=Schedule.from_decisions((3,), (0.3,), LAYERS, action), trace=True)
        for action in ("delete", "reroute")
    ]
    np.testing.assert_allclose(found[0].logits, found[1].logits, atol=1e-5)
    np.testing.assert_array_equal(found[0].trace.kv_tokens, found[1].trace.kv_tokens)


def test_text_alone_runs_the_unrouted_plan():
    """The smallest bucket of visual tokens is no reason to score, gather and scatter."""
    _, model = qwen_pair()
    for name in ("pdrop-reroute", "nuwa-delete", "random-reroute"):
        batch = model.inputs(input_ids=ROWS.ids[3][None], schedule=schedule_of(name))
        assert [(stage.lo, stage.hi, stage.cap) for stage in batch.plan.stages] == [(0, LAYERS, None)]
        assert batch.prompt.ids.shape == (1, batch.prompt.text_slots)
