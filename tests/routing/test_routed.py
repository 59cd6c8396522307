"""Routed LLaVA against the eager torch reference, which takes one sample at a time and really removes or bypasses."""

import zlib

import numpy as np
import pytest

from convert.crosscheck.reference import run
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.prior import prior_scores
from tests.checkpoints import LAYERS, pair
from tests.marks import cases
from tests.ragged import padded
from tests.tiny import random_ids, random_pixels

GRID = (6, 6)
BUDGET = 192
ROUTES = {
    "fastv-delete": {"method": "fastv", "action": "delete"},
    "fastv-reroute": {"method": "fastv", "action": "reroute"},
    "fastv-previous": {"method": "fastv", "action": "delete", "score_source": "previous_layer"},
    "fastv-renumber": {"method": "fastv", "action": "delete", "position_mode": "renumber"},
    "pdrop-delete": {"method": "pdrop", "action": "delete"},
    "pdrop-reroute": {"method": "pdrop", "action": "reroute"},
    "pdrop-every": {"method": "pdrop", "action": "reroute", "decisions": "every"},
    "pdrop-every2-delete": {"method": "pdrop", "action": "delete", "decisions": "every:2"},
    "pdrop-renumber": {"method": "pdrop", "action": "delete", "position_mode": "renumber"},
    "pdrop-reroute-renumber": {"method": "pdrop", "action": "reroute", "position_mode": "renumber"},
    "nuwa-delete": {"method": "nuwa", "action": "delete"},
    "nuwa-reroute": {"method": "nuwa", "action": "reroute"},
    "nuwa-host": {"method": "nuwa", "action": "reroute", "nuwa_first_score": "host"},
    "nuwa-flat": {"method": "nuwa", "action": "reroute", "variant": "flat"},
    "nuwa-pyramid": {"method": "nuwa", "action": "reroute", "variant": "pyramid"},
    "nuwa-unit-weights": {"method": "nuwa", "action": "delete", "self_weight_override": False},
    "random-delete": {"method": "random", "action": "delete"},
    "random-reroute": {"method": "random", "action": "reroute", "seed": 3},
    "uniform": {"method": "uniform", "action": "delete"},
    "pool": {"method": "pool"},
    "downsample": {"method": "downsample"},
    "downsample-renumber": {"method": "downsample", "position_mode": "renumber"},
    "downsample-blur": {"method": "downsample", "blur": True},
    "layout": {"method": "layout"},
    "divprune": {"method": "divprune"},
    "divprune-renumber": {"method": "divprune", "position_mode": "renumber"},
    "hiprune": {"method": "hiprune"},
    "visionzip": {"method": "visionzip"},
    "visionzip-released": {"method": "visionzip", "cls": "keep", "position_mode": "renumber"},
    "feather": {"method": "feather", "action": "delete"},
    "feather-reroute": {"method": "feather", "action": "reroute"},
    "feather-union": {"method": "feather", "action": "delete", "floor_count": "union"},
    "v2drop": {"method": "v2drop", "action": "delete"},
    "v2drop-reroute": {"method": "v2drop", "action": "reroute"},
    "ivc": {"method": "ivc", "action": "delete"},
    "ivc-reroute": {"method": "ivc", "action": "reroute"},
    "swiftvlm": {"method": "swiftvlm"},
    "ivc-release": {"method": "ivc", "action": "delete", "ivc_llava_release": True, "budget_of": "kv"},
}
EDGES = {
    "layer-0": Schedule.from_decisions((0, 3), (0.5, 0.25), LAYERS, "reroute"),
    "last-layer": Schedule.from_decisions((2, LAYERS - 1), (9, 4), LAYERS, "delete"),
    "mixed": Schedule.from_decisions((1, 2, 3, 4), (20, 5, 12, 4), LAYERS, ("delete", "reroute", "layout", "delete")),
    "mixed-previous": Schedule.from_decisions(
        (1, 3, 5),
        (10, 16, 6),
        LAYERS,
        ("reroute", "delete", "reroute"),
        score=("last_token", "last_token", "previous_layer"),
    ),
    "keep-all": Schedule.from_decisions((2, 4), (1.0, 1.0), LAYERS, "reroute"),
}


def schedule_of(model, name):
    return EDGES[name] if name in EDGES else model.plan(budget=BUDGET, **ROUTES[name])


def reference(model, torch_model, ids, pixels, schedule, **more):
    prior = None
    if schedule.prior is not None and pixels is not None:
        prior = prior_scores(schedule, [GRID], zlib.crc32(ids.astype(np.int64).tobytes()))
    return run(torch_model, ids, pixels, schedule, prior=prior, **more)


SLOW = {"fastv-reroute", "fastv-renumber", "pdrop-every2-delete", "pdrop-reroute-renumber", "nuwa-host", "nuwa-flat"}
SLOW |= {
    "random-delete",
    "uniform",
    "divprune",
    "v2drop",
    "ivc",
    "mixed-previous",
    "keep-all",
    "nuwa-pyramid",
    "layout",
}
SLOW |= {"nuwa-unit-weights", "feather", "fastv-previous", "last-layer", "nuwa-delete", "pdrop-delete", "downsample"}
SLOW |= {"downsample-renumber", "downsample-blur", "visionzip", "feather-union"}
SLOW |= {"swiftvlm", "layer-0", "ivc-reroute", "mixed"}
# What decode sees of a route: the length of each stage's cache and the positions. Other routes differ in scores only.
GENERATED = {"fastv-delete", "fastv-renumber", "pdrop-reroute", "pdrop-renumber", "pdrop-reroute-renumber", "layer-0"}
GENERATED |= {"divprune-renumber", "visionzip-released", "ivc-release", "nuwa-reroute", "last-layer"}
# Attention in blocks, and errors of rope, which grow with the distance.
LENGTHS = {"pdrop-every": (320, 300, 80)}
PIXELS = random_pixels(2, seed=4)


def prompts(name=None):
    """Two rows with an image each and one without."""
    lengths, starts = LENGTHS.get(name, (100, 90, 60)), (6, 0, None)
    return [random_ids(size, start=at, seed=k) for k, (size, at) in enumerate(zip(lengths, starts, strict=True))]


def batch(rows):
    ids, mask = padded(rows)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": PIXELS}


@pytest.mark.parametrize("name", cases([*ROUTES, *EDGES], SLOW))
def test_equals_the_reference(name):
    check(2, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pdrop-reroute", "nuwa-delete"])
def test_equals_the_reference_where_heads_share_no_keys(name):
    check(4, name)


def check(kv_heads, name):
    """Selections, scores, anchors, cached rows, logits, and greedy tokens, each row of a ragged batch as if alone."""
    torch_model, model = pair(kv_heads)
    schedule, rows, images = schedule_of(model, name), prompts(name), [PIXELS[:1], PIXELS[1:], None]
    new = 8 if name in GENERATED else 0
    expected = [
        reference(model, torch_model, ids, image, schedule, max_new_tokens=new)
        for ids, image in zip(rows, images, strict=True)
    ]
    given = batch(rows)
    result = model.prefill(**given, schedule=schedule, trace=True)
    for row, wanted in enumerate(expected):
        np.testing.assert_allclose(result.logits[row], wanted.logits, atol=1e-4)
        np.testing.assert_array_equal(result.trace.kv_tokens[row], [len(ran) for ran in wanted.ran])
        if wanted.anchors is not None:
            np.testing.assert_array_equal(result.trace.anchors[row], np.unique(wanted.anchors))
            for selected in result.trace.selected:
                assert set(selected[row]) <= {-1, *result.trace.anchors[row]}
        for number, selected in enumerate(result.trace.selected):
            if images[row] is None:
                assert (selected[row] == -1).all()
                continue
            decision = wanted.decisions[number]
            np.testing.assert_array_equal(selected[row][selected[row] >= 0], decision.selected)
            np.testing.assert_allclose(result.trace.scores[number][row], decision.scores, atol=1e-5, rtol=1e-5)
    if new:
        tokens = model.generate_ids(**given, schedule=schedule, max_new_tokens=new)
        np.testing.assert_array_equal(tokens, [wanted.tokens for wanted in expected])


@pytest.mark.slow
def test_renumbering_changes_the_answer():
    """The two position modes must not be the same program (27.8 against 1.9 on RefCOCO testA, arXiv 2606.12412)."""
    _, model = pair(2)
    logits = [
        model.prefill(**batch(prompts()), schedule=schedule_of(model, name)).logits
        for name in ("fastv-delete", "fastv-renumber")
    ]
    assert (np.abs(logits[0] - logits[1]).max(axis=1) > 0.1)[:2].all()


@pytest.mark.slow
def test_keep_all_is_no_routing_and_one_decision_deletes_as_it_reroutes():
    _, model = pair(2)
    given = batch(prompts())
    plain = model.prefill(**given).logits
    kept = model.prefill(**given, schedule=EDGES["keep-all"]).logits
    np.testing.assert_allclose(kept, plain, atol=1e-5)
    one = [
        model.prefill(**given, schedule=Schedule.from_decisions((3,), (0.2,), LAYERS, action), trace=True)
        for action in ("delete", "reroute")
    ]
    np.testing.assert_allclose(one[0].logits, one[1].logits, atol=1e-5)
    np.testing.assert_array_equal(one[0].trace.kv_tokens, one[1].trace.kv_tokens)
