"""FEATHER, V2Drop and IVC-Prune: the solver's tables of section 17, floors, and what is refused."""

from fractions import Fraction

import pytest

from reroute_jax.errors import RerouteError
from reroute_jax.routing.cost import account, visual_per_layer
from reroute_jax.routing.floors import RotaryAnchors, StrideGrid
from reroute_jax.routing.methods import plan
from reroute_jax.routing.plan import Schedule
from tests.routing.test_cost import LLAVA_7B

OFFICIAL = {"num_layers": 32, "visual": 576, "grid": (24, 24)}


def made(method, budget=None, action="delete", **switches) -> Schedule:
    return plan(method, **OFFICIAL, budget=budget, action=action, **switches)


def layers(schedule):
    return [stage.lo for stage in schedule.decisions]


def counts(schedule, visual=576):
    return schedule.keep_counts([visual])[:, 0].tolist()


def average(schedule):
    return sum(visual_per_layer(schedule, 576)) / 32


@pytest.mark.parametrize(
    ("method", "budget", "switches", "where", "keep", "realised"),
    [
        ("feather", 192, {}, [8, 16], [162, 14], 191.50),
        ("feather", 128, {}, [5, 10], [174, 15], 127.50),
        ("feather", 64, {}, [2, 4], [198, 17], 63.25),
        ("v2drop", 192, {}, [3, 17, 22], [267, 133, 1], 191.91),
        ("v2drop", 128, {}, [3, 17, 22], [142, 71, 1], 127.53),
        ("v2drop", 64, {}, [3, 17, 22], [18, 9, 1], 63.59),
        ("ivc", 192, {"budget_of": "kv"}, [16], [192], 384),
        ("ivc", 128, {"budget_of": "kv"}, [16], [128], 352),
        ("ivc", 64, {"budget_of": "kv"}, [16], [64], 320),
        ("ivc", 192, {}, [8], [64], 192),
        ("ivc", 128, {}, [5], [45], 127.97),
        ("ivc", 64, {}, [2], [29], 63.19),
    ],
)
def test_solved_budgets(method, budget, switches, where, keep, realised):
    schedule = made(method, budget, **switches)
    assert (layers(schedule), counts(schedule)) == (where, keep)
    assert average(schedule) == pytest.approx(realised, abs=0.005)
    again = Schedule.from_record(schedule.to_record())
    assert again == schedule


def test_kv_of_a_cut_cache():
    cost = account(made("ivc", 192, budget_of="kv"), LLAVA_7B, text=60, visual=576, grid=(24, 24))
    assert (cost.kv_visual, cost.average) == (192 * 32, 384)
    first = account(made("ivc", 192, cut_caches="all_but_first"), LLAVA_7B, text=60, visual=576, grid=(24, 24))
    assert first.kv_visual == 576 + 31 * 64


def test_explicit_decisions():
    official = made("v2drop", keep=(288, 144, 1))
    assert (layers(official), average(official)) == ([3, 17, 22], 202.8125)
    assert made("v2drop", keep=(288, 144, 1)).label == "v2drop delete keep=288,144,1"
    assert counts(made("ivc", keep=Fraction(1, 2))) == [288]
    given = made("feather", layers=(4, 8), keep=(100, 10), stride=4)
    assert (layers(given), counts(given), given.decisions[0].floor) == ([4, 8], [100, 10], StrideGrid(4))


def test_scores_of_each_action():
    def scores(schedule):
        return [stage.score for stage in schedule.decisions]

    assert scores(made("feather", 128)) == ["previous_layer_unrotated"] * 2
    assert scores(made("feather", 128, "reroute")) == ["last_token_unrotated"] * 2
    assert scores(made("feather", 128, score_source="own_layer")) == ["last_token_unrotated"] * 2
    assert scores(made("ivc", 128)) == ["value_similarity"]
    assert scores(made("ivc", 128, "reroute")) == ["value_similarity", "value_similarity_own"]
    assert layers(made("ivc", 128, "reroute")) == [5, 23]
    assert scores(made("v2drop", 128, "reroute")) == ["hidden_change"] * 3


def test_feather_as_released_is_bounded():
    """The grid on top of the best 30 %; then 9 % of what was kept, whatever that was (14.3)."""
    released = made("feather", keep=(Fraction(3, 10), Fraction(9, 100)), floor_count="union")
    assert counts(released)[0] == 172
    solved = made("feather", 192, floor_count="union")
    stage = solved.resolve(576).stages[1]
    assert (counts(solved)[0], stage.cap, stage.union) == (98, 98 + 192, True)
    assert solved.resolve(576).stages[2].share == Fraction(9, 100)


def test_one_layer_may_be_given_as_a_number():
    assert made("ivc", keep=9, layers=16) == made("ivc", keep=(9,), layers=[16])


def test_ivc_as_released_for_llava():
    schedule = made("ivc", keep=Fraction(1, 5), layers=(16,), ivc_llava_release=True)
    (stage,) = schedule.decisions
    assert (stage.floor, stage.union) == (RotaryAnchors(Fraction(1, 20), Fraction(1, 100), of_kept=False), True)
    assert (stage.score, schedule.cut_caches) == ("value_similarity_all_rows", "all_but_first")
    assert (counts(schedule), schedule.resolve(576).stages[1].cap) == ([115], 115 + 58 + 6)


# Seeds and counts round halves to even (13.3): 1 % of 250 and 50 % of 35.
def test_seeds():
    floor = RotaryAnchors(Fraction(1, 10), Fraction(1, 100), of_kept=False)
    assert [floor.seeds(visual, 0) for visual in (0, 36, 250, 350, 576)] == [0, 1, 2, 4, 6]
    assert [RotaryAnchors().seeds(576, keep) for keep in (288, 64, 1)] == [6, 1, 1]


REFUSED = {
    "too small for the grid": (lambda: made("feather", Fraction(1, 24)), "its grid .* takes 64"),
    "too small": (lambda: made("v2drop", Fraction(1, 20)), "fewer than one token"),
    "too large": (lambda: made("v2drop", Fraction(9, 10)), "more than its decisions"),
    "wrong decisions": (lambda: made("v2drop", 128, layers=(3, 9)), "expected 3 ascending layers"),
    "layer 0": (lambda: made("ivc", keep=9, layers=(0,)), "layer 0 has no previous layer"),
    "layer that is not there": (
        lambda: made("ivc", 128, layers=(32,)),
        "decides at layer 32 first, of a decoder with 32",
    ),
    "twice": (lambda: made("ivc", 128, keep=64), "budget and keep both set"),
    "other method": (lambda: made("fastv", 128, stride=2), "no use for stride=2"),
    "union under reroute": (lambda: made("feather", 128, "reroute", floor_count="union"), "belongs to action='delete'"),
    "release with little": (lambda: made("ivc", 192, ivc_llava_release=True), "together 11 %"),
    "release of qwen": (
        lambda: made("ivc", 192, family="qwen2_5_vl", ivc_llava_release=True),
        "ivc_llava_release of method 'ivc' is for llava",
    ),
    "seeds of one pass": (
        lambda: Schedule.from_decisions((3,), (9,), 8, floor=RotaryAnchors()),
        "'last_token' has one",
    ),
    "values after a reroute": (
        lambda: Schedule.from_decisions((3, 5), (9, 9), 8, score="value_similarity"),
        "has not seen every token",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    ask, said = REFUSED[case]
    with pytest.raises(RerouteError, match=said):
        ask()
