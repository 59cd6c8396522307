"""Routed Qwen3-VL against the eager torch reference, whose decisions fall between DeepStack's additions: every method
and action, the three policies, rows with images of different sizes in one batch, decode."""

from functools import cache

import numpy as np
import pytest
import torch

from convert.crosscheck.layers import RaggedRows
from convert.crosscheck.reference import route
from reroute_jax.errors import RerouteError
from reroute_jax.routing.methods import plan
from reroute_jax.routing.plan import Schedule
from tests.checkpoints import qwen3_pair
from tests.marks import cases
from tests.ragged import RaggedPrompts, reference
from tests.tiny_qwen3 import LAYERS

NEW = 5
# By method, action and switches; decisions at 1, 2, 3, 4 unless they say otherwise, and additions behind 0, 1, 2.
ROUTES = {
    "fastv-delete": {"method": "fastv", "action": "delete"},
    "fastv-previous": {"method": "fastv", "action": "delete", "score_source": "previous_layer", "first_decision": 2},
    "fastv-reroute": {"method": "fastv", "action": "reroute"},
    "pdrop-delete": {"method": "pdrop", "action": "delete"},
    "pdrop-reroute": {"method": "pdrop", "action": "reroute"},
    "pdrop-running": {"method": "pdrop", "action": "reroute", "deepstack": "running"},
    "pdrop-late": {"method": "pdrop", "action": "reroute", "deepstack": "late", "first_decision": 3},
    "pdrop-first-image": {"method": "pdrop", "action": "reroute", "first_image_only": True},
    "layout": {"method": "layout"},
    "layout-running": {"method": "layout", "deepstack": "running"},
    "nuwa-delete": {"method": "nuwa", "action": "delete"},
    "nuwa-reroute": {"method": "nuwa", "action": "reroute"},
    "random-reroute": {"method": "random", "action": "reroute", "seed": 3},
    "uniform-running": {"method": "uniform", "action": "reroute", "deepstack": "running"},
    "swiftvlm": {"method": "swiftvlm"},
    "swiftvlm-running": {"method": "swiftvlm", "deepstack": "running"},
    "pdrop-mean-offset": {"method": "pdrop", "action": "reroute", "repair": "mean_offset"},
    "v2drop-reroute": {"method": "v2drop", "action": "reroute", "layers": (1, 2, 4)},
    "pool": {"method": "pool"},
    "downsample": {"method": "downsample"},
    "divprune": {"method": "divprune"},
    "visionzip": {"method": "visionzip"},
    "hiprune": {"method": "hiprune"},
}
EDGES = {
    "every-layer": Schedule.from_decisions((0, 1, 2, 3, 4), (0.5, 9, 14, 5, 9), LAYERS, "reroute"),
    "mixed": Schedule.from_decisions((0, 2, 3), (20, 8, 5), LAYERS, ("reroute", "layout", "delete")),
}
# Nuwa reaches 4/7; before a first decision at layer 3 half of the budget is spent.
BUDGETS = {"nuwa-delete": 0.4, "nuwa-reroute": 0.4, "pdrop-late": 0.7}
GENERATED = {"pdrop-delete", "pdrop-reroute", "pdrop-running"}
# Where DeepStack adds nothing to what a route does, another family shows it.
SLOW = {"fastv-delete", "fastv-previous", "fastv-reroute", "pdrop-first-image", "layout", "nuwa-reroute", "hiprune"}
SLOW |= {"random-reroute", "uniform-running", "pool", "visionzip", "layout-running", "every-layer", "swiftvlm"}
SLOW |= {"divprune", "pdrop-mean-offset", "v2drop-reroute", "downsample", "pdrop-delete"}

# A row with two images, one with a small one, one without.
ROWS = RaggedPrompts(
    qwen3_pair, grids=(((5, 6), (7, 3)), ((3, 4),), ()), lengths=(90, 40, 30), starts=(6, 20, 0), new=NEW
)
BATCH = range(3)


@cache
def schedule_of(name):
    if name in EDGES:
        return EDGES[name]
    return qwen3_pair()[1].plan(**ROUTES[name], budget=BUDGETS.get(name, 0.5))


def expected(name, row):
    return reference(ROWS, schedule_of(name), row)


@pytest.mark.parametrize("name", cases([*ROUTES, *EDGES], SLOW))
def test_equals_the_reference(name):
    """Selections, scores, anchors, cached rows, logits and greedy tokens; each row of a ragged batch as if alone."""
    _, model = qwen3_pair()
    schedule, given = schedule_of(name), ROWS.batch(BATCH)
    result = model.prefill(**given, schedule=schedule, trace=True)
    for row in BATCH:
        ROWS.check(result, row, row, schedule)
    if name in GENERATED:
        tokens = model.generate_ids(**given, schedule=schedule, max_new_tokens=NEW)
        np.testing.assert_array_equal(tokens, [expected(name, row).tokens for row in BATCH])


def test_policies_differ_where_a_decision_comes_before_an_addition():
    """What no policy changed would prove none of them."""
    for one, other in (("pdrop-reroute", "pdrop-running"), ("layout", "layout-running")):
        assert np.abs(expected(one, 0).logits - expected(other, 0).logits).max() > 1e-2


@pytest.mark.slow
def test_keeping_everything_is_an_unrouted_run_under_every_policy():
    _, model = qwen3_pair()
    plain = model.prefill(**ROWS.batch(BATCH)).logits
    for policy, layers in (("all", (1, 2)), ("running", (1, 2)), ("late", (3, 4))):
        schedule = Schedule.from_decisions(layers, (1.0, 1.0), LAYERS, "reroute", deepstack=policy)
        np.testing.assert_allclose(model.prefill(**ROWS.batch(BATCH), schedule=schedule).logits, plain, atol=1e-5)


# --- The specification's toy: a layer adds 1, additions of 10, 100 and 1000, all rows start at 0 ----------------------


@pytest.mark.parametrize(
    ("action", "policy", "selected", "seen", "final"),
    [
        ("reroute", "all", [0, 2], "3 1111 1113 1111 1113 1113 1111 3", "6 1114 1113 1114 1113 1113 1111 6"),
        ("reroute", "running", [0, 2], "3 11 1113 11 1113 1113 11 3", "6 14 1113 14 1113 1113 11 6"),
        ("delete", "all", [3, 4], "3 1113 1113 1113 3", "6 1116 1116 6"),
        ("delete", "running", [3, 4], "3 1113 1113 1113 3", "6 1116 1116 6"),
    ],
)
def test_routing_toy(action, policy, selected, seen, final):
    visual = torch.tensor([-1, 0, 1, 2, 3, 4, 5, -1])
    added = torch.where(visual[:, None] < 0, 0.0, torch.tensor([[10.0, 100.0, 1000.0]]))
    rows = RaggedRows(torch.zeros(8, 1), torch.arange(8)[None], torch.arange(8), visual, added)
    scores = {1: [0.1, 0.6, 0.2, 0.5, 0.4, 0.3], 3: [0.9, 0.1, 0.8, 0.2, 0.3, 0.0]}
    at = []

    def score(given):
        at.append(given.rows.hidden[:, 0].tolist())
        return torch.tensor(scores[given.stage.lo])[given.rows.visual.clamp(min=0)]

    schedule = Schedule.from_decisions((1, 3), (3, 2), 6, action, deepstack=policy)
    left, walk = route(rows, schedule, lambda number, rows: (rows.hidden + 1, None), score, 6, 8)
    assert at[0] == [1, 11, 11, 11, 11, 11, 11, 1]
    assert at[1] == [float(value) for value in seen.split()]
    assert walk.decisions[0].selected.tolist() == [1, 3, 4] and walk.decisions[1].selected.tolist() == selected
    assert left.hidden[:, 0].tolist() == [float(value) for value in final.split()]
    assert [len(ran) for ran in walk.ran] == [8, 5, 5, 4, 4, 4]


def test_what_cannot_be_is_refused():
    _, model = qwen3_pair()
    late = Schedule.from_decisions((2,), (0.5,), LAYERS, "reroute", deepstack="late")
    with pytest.raises(RerouteError, match=r"'late' and a decision at layer 2: .* first 3 layers, decide from layer 3"):
        model.inputs(**ROWS.batch(BATCH), schedule=late)
    with pytest.raises(RerouteError, match="deepstack is 'never'"):
        Schedule.from_decisions((2,), (0.5,), LAYERS, "reroute", deepstack="never")
    sizes = {"num_layers": 8, "visual": 576, "grid": (24, 24), "budget": 192}
    with pytest.raises(RerouteError, match="deepstack of method 'pdrop' is for qwen3_vl"):
        plan("pdrop", **sizes, deepstack="running")
    with pytest.raises(RerouteError, match="method 'nuwa' has no use for deepstack"):
        plan("nuwa", **sizes, family="qwen3_vl", deepstack="running")
