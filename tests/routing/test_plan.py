"""Schedules and what is refused."""

from fractions import Fraction

import numpy as np
import pytest

from reroute_jax.errors import RerouteError
from reroute_jax.routing.nuwa import NuwaMerge, candidate_count
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.pool import PoolMerge
from reroute_jax.routing.stages import Stage
from reroute_jax.routing.static_plan import RoutingPlan, StagePlan

# Section 11, vector 1: ratio -> count at n = 576.
KEEP_576 = {
    0.2644: 152, 0.1418: 81, 0.01916: 11, 0.4502: 259, 0.2251: 129, 0.1126: 64, 0.5965: 343, 0.3558: 204,
    0.2123: 122, 0.1266: 72, 0.2655: 152, 0.1328: 76, 0.0664: 38, 0.4570: 263, 0.2088: 120, 0.0954: 54,
    0.0436: 25, 0.1392: 80, 0.0696: 40, 0.0348: 20, 0.2789: 160, 0.0937: 53, 0.0315: 18, 0.0106: 6,
}  # fmt: skip


def keep(ratio, visual):
    return Stage(0, 1, ratio=ratio, action="delete", score="last_token").keep(visual)


@pytest.mark.parametrize(("ratio", "count"), KEEP_576.items())
def test_keep_count_at_576(ratio, count):
    assert keep(ratio, 576) == count


def test_keep_count_truncates_in_double_precision_and_never_below_one():
    assert keep(0.01, 10) == 1
    assert keep(0.2644, 345) == 91
    assert keep(0.142857, 112) == 15
    assert keep(16 / 112, 112) == 16
    assert keep(0.5, 0) == 0


def test_fraction_keeps_exactly_where_a_float_loses_one():
    assert keep(31 / 39, 39) == 30
    assert keep(Fraction(31, 39), 39) == 31


def routed(action="delete", keep=(0.6, 0.36, 0.21, 0.13), layers=(1, 3, 5, 6), **more):
    return Schedule.from_decisions(layers, keep, 8, action, **more)


def test_from_decisions_tiles_the_decoder():
    schedule = routed()
    assert [(s.lo, s.hi) for s in schedule.stages] == [(0, 1), (1, 3), (3, 5), (5, 6), (6, 8)]
    assert [s.ratio for s in schedule.stages] == [None, 0.6, 0.36, 0.21, 0.13]
    assert [s.action for s in schedule.stages] == [None, *["delete"] * 4]
    assert schedule.num_layers == 8
    assert hash(schedule) == hash(routed())


def test_resolve_gives_the_static_plan():
    plan = routed("reroute", layers=(2, 5), keep=(0.5, 3)).resolve(10)
    one, two = StagePlan(2, 5, 5, "reroute", "last_token"), StagePlan(5, 8, 3, "delete", "last_token")
    assert plan == RoutingPlan((StagePlan(0, 2, None, None, None), one, two), position_mode="original")


def test_static_plan_holds_nothing_that_would_compile_twice():
    one = routed("delete", label="a", keep=(0.6, 0.36, 0.21, 0.13))
    two = routed("delete", label="b", keep=(0.61, 0.361, 0.211, 0.131))
    assert one.resolve(10) == two.resolve(10)


def test_what_the_last_decision_leaves_out_has_nowhere_to_return_to():
    actions = ("layout", "reroute", "delete")
    one, two, three = (routed(action, layers=(3,), keep=(4,)).resolve(10) for action in actions)
    assert one == two == three
    assert [stage.action for stage in routed("layout").resolve(10).stages] == [None, *["layout"] * 3, "delete"]


def test_decision_at_layer_zero_and_at_the_last_layer():
    plan = routed(layers=(0, 7), keep=(4, 2)).resolve(10)
    assert plan.stages == (StagePlan(0, 7, 4, "delete", "last_token"), StagePlan(7, 8, 2, "delete", "last_token"))


def test_schedule_without_decisions():
    schedule = Schedule.from_decisions((), (), 3)
    assert schedule.resolve(9) == Schedule.from_decisions((), (), 3, "reroute").resolve(9)
    assert schedule.resolve(9).stages == (StagePlan(0, 3, None, None, None),)
    assert schedule.keep_counts([9, 4]).shape == (0, 2)


def test_keep_counts_are_each_rows_own():
    counts = routed(keep=(0.6, 0.36, 0.21, 0.13)).keep_counts(np.array([576, 0, 10, 1]))
    assert counts.dtype == np.int32
    assert counts.T.tolist() == [[345, 207, 120, 74], [0, 0, 0, 0], [6, 3, 2, 1], [1, 1, 1, 1]]


def test_counts_are_limited_to_the_candidates():
    # The count of a deletion is limited to what is left, that of a reroute to the row's own tokens.
    mixed = {"layers": (1, 3), "keep": (0.25, 5)}
    assert routed("delete", **mixed).keep_counts([24, 8, 3]).T.tolist() == [[6, 5], [2, 2], [1, 1]]
    assert routed("reroute", **mixed).keep_counts([24, 8, 3]).T.tolist() == [[6, 5], [2, 5], [1, 3]]
    assert routed("layout", **mixed).keep_counts([8]).T.tolist() == [[2, 2]]


def test_each_decision_has_its_own_action():
    schedule = routed(("delete", "reroute", "reroute", "delete"), keep=(6, 2, 4, 6))
    assert [stage.action for stage in schedule.decisions] == ["delete", "reroute", "reroute", "delete"]
    # Six tokens outlive the first decision; what the others left out returned.
    assert schedule.keep_counts([24, 5]).T.tolist() == [[6, 2, 4, 6], [5, 2, 4, 5]]
    with pytest.raises(RerouteError, match="count rises from 6 to 7"):
        routed(("delete", "reroute", "reroute", "delete"), keep=(6, 2, 7, 6))
    last = routed(("reroute", "delete", "delete", "delete"), score=["last_token"] * 2 + ["previous_layer"] * 2)
    assert last.decisions[2].score == "previous_layer"


def test_numpy_numbers_are_taken():
    plain, numpy = (
        routed(layers=(1, 3), keep=(5, 0.3)),
        routed(layers=tuple(np.array([1, 3])), keep=(np.int64(5), np.float64(0.3))),
    )
    assert plain == numpy


def test_merged_count():
    assert Schedule.from_decisions((), (), 2).merged_count(12, (3, 4)) == 12
    assert Schedule.from_decisions((), (), 2, merge=PoolMerge(Fraction(1, 2))).merged_count(12, (3, 4)) == 6
    assert Schedule.from_decisions((), (), 2, merge=NuwaMerge(Fraction(7, 36), 1)).merged_count(576, (24, 24)) == 112


# Section 4.1.
@pytest.mark.parametrize(
    ("tier", "top_n", "anchors", "candidates"), [(64, 1, 112, 144), (128, 2, 224, 288), (192, 3, 336, 432)]
)
def test_nuwa_constants_at_the_official_size(tier, top_n, anchors, candidates):
    merge = NuwaMerge(Fraction(7 * tier, 4 * 576), top_n)
    assert merge.anchors(576, (24, 24)) == merge.cap(576) == anchors
    assert candidate_count((24, 24), top_n) == candidates
    assert merge.radius((24, 24)) == pytest.approx(280**0.5)


def test_nuwa_constants_at_other_sizes():
    assert NuwaMerge(Fraction(7, 36), 1).radius((6, 12)) == pytest.approx(280**0.5 / 2)
    assert NuwaMerge(Fraction(7, 36), 1).anchors(64, (8, 8)) == 13
    # 1.75 * 5 / 24 of 576 patches are exactly 210; in floating point they are a little more and 211 would be kept.
    assert NuwaMerge(Fraction(7, 4) * Fraction(5, 24), 2).anchors(576, (24, 24)) == 210


# Section 11, vector 9: counts and radius on Qwen's merged grid.
@pytest.mark.parametrize(("share", "top_n", "anchors"), [(35, 3, 6), (60, 3, 9), (85, 4, 13)])
def test_nuwa_on_an_odd_grid(share, top_n, anchors):
    merge = NuwaMerge(Fraction(share, 100), top_n, Fraction(1, 10), diagonal_radius=True)
    assert merge.anchors(15, (3, 5)) == anchors
    assert merge.radius((3, 5)) == pytest.approx(4.6648, abs=1e-4)


def test_nuwa_candidates_of_an_odd_grid_are_real_patches():
    # 3 x 5: two full regions, then 2, 2, 2 and 1 cells at the edges.
    assert [candidate_count((3, 5), top_n) for top_n in (1, 2, 3, 4)] == [6, 11, 13, 15]
    assert NuwaMerge(Fraction(35, 36), 4).anchors(15, (3, 5)) == 15
    assert NuwaMerge(Fraction(1, 2), 1).anchors(15, (3, 5)) == 6


ERRORS = {
    "gap": (
        lambda: Schedule((Stage(0, 2), Stage(3, 4, count=1, action="delete", score="prior"))), r"\[3, 4\).*layer 2"),
    "late start": (lambda: Schedule((Stage(1, 2, count=1, action="delete", score="prior"),)), "start at layer 0"),
    "no stages": (lambda: Schedule(()), "no stages"),
    "empty stage": (lambda: Stage(2, 2), "0 <= lo < hi"),
    "negative layer": (lambda: Stage(-1, 2), "0 <= lo < hi"),
    "late stage without decision": (
        lambda: Schedule((Stage(0, 2, count=1, action="reroute", score="last_token"), Stage(2, 4))), "only the first"),
    "ratio and count": (lambda: Stage(0, 2, ratio=0.5, count=3, score="last_token"), "both a ratio and a count"),
    "ratio 0": (lambda: routed(keep=(0.0, 0.1, 0.1, 0.1)), r"ratio of 0, expected a value in \(0, 1\]"),
    "ratio above 1": (lambda: routed(keep=(1.01, 0.1, 0.1, 0.1)), r"1.01, expected a value in \(0, 1\]"),
    "no number": (lambda: routed(keep=(True, 0.5, 0.5, 0.5)), "keeps True, expected a whole number"),
    "count 0": (lambda: routed(keep=(3, 2, 1, 0)), "at least 1"),
    "score without decision": (lambda: Stage(0, 2, score="last_token"), "score but no ratio"),
    "action without decision": (lambda: Stage(0, 2, action="delete"), "action but no ratio"),
    "decision without action": (lambda: Stage(0, 2, count=2), "None, expected one of: delete, reroute, layout"),
    "decision without score": (
        lambda: Stage(0, 2, count=2, action="delete"), "expected one of: last_token, .*prior"),
    "unknown score": (lambda: routed(score="norm"), "'norm', expected one of: last_token, .*prior"),
    "unknown action": (lambda: routed(action="drop"), "'drop', expected one of: delete, reroute, layout"),
    "unknown mode": (lambda: routed(position_mode="shift"), "'shift', expected one of: original, renumber"),
    "unknown prior": (lambda: routed(score="prior", prior="blue"), "'blue', expected one of: random, uniform"),
    "score prior without prior": (lambda: routed(score="prior"), "expected one of: random, uniform"),
    "prior without use": (lambda: routed(prior="random"), "no stage has score='prior'"),
    "rising ratios": (lambda: routed(keep=(0.1, 0.2, 0.1, 0.1)), "ratio rises from 0.1 to 0.2"),
    "rising counts": (lambda: routed(keep=(4, 5, 5, 5)), "count rises from 4 to 5"),
    "rising counts of a layout": (
        lambda: routed("layout", keep=(4, 5, 5, 5)), "count rises from 4 to 5"),
    "rising mixture": (lambda: routed(layers=(1, 3), keep=(0.25, 5)).resolve(8), "8 visual tokens rises from 2 to 5"),
    "unsorted layers": (lambda: routed(layers=(1, 5, 3, 6)), r"ascending layers in 0\.\.7"),
    "doubled layer": (lambda: routed(layers=(1, 3, 3, 6)), r"ascending layers in 0\.\.7"),
    "layer past the end": (lambda: routed(layers=(1, 3, 5, 8)), r"ascending layers in 0\.\.7"),
    "missing keep": (lambda: routed(keep=(0.5, 0.4)), "4 decision layers with 2 of keep"),
    "missing score": (lambda: routed(score=("last_token",)), "with 1 of score"),
    "missing action": (lambda: routed(("delete",)), "4 decision layers with 1 of action"),
    "previous layer of layer 0": (
        lambda: routed(layers=(0, 3, 5, 6), score="previous_layer"), "layer 0 has no previous layer"),
    "previous layer of a later reroute": (
        lambda: routed("reroute", score="previous_layer"), "layer 3: after a decision that reroutes"),
    "previous layer of a layout": (
        lambda: routed("layout", score="previous_layer"), "layer 3: after a decision that layouts"),
    "negative seed": (lambda: routed(score="prior", prior="random", seed=-1), "seed is -1"),
    "negative visual": (lambda: routed().resolve(-1), "-1 visual tokens"),
    "other depth": (lambda: routed().check_depth(12), "covers 8 layers and the model has 12"),
    "merge budget": (lambda: NuwaMerge(Fraction(3, 2), 4), r"share of 3/2, expected a fraction in \(0, 1\]"),
    "merge grid": (lambda: NuwaMerge(Fraction(1, 3), 1).anchors(12, (4, 4)), "4 x 4 does not hold 12"),
    "merge candidates": (lambda: NuwaMerge(Fraction(1, 3), 5), "top_n is 5"),
    "pool to nothing": (lambda: PoolMerge(Fraction(0)), "share of 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_gives_one_line(name):
    make, message = ERRORS[name]
    with pytest.raises(RerouteError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_valid_uses_of_the_previous_layer():
    assert routed("delete", score="previous_layer").decisions[-1].score == "previous_layer"
    first = routed("reroute", score=("previous_layer", *["last_token"] * 3))
    assert [s.score for s in first.decisions] == ["previous_layer"] + ["last_token"] * 3
    assert first.check_depth(8) is None
