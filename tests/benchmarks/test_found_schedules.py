"""Which schedules compete with those that were found, and what they may spend."""

from collections import Counter
from fractions import Fraction

import pytest

from benchmarks.found_schedules import BY_HAND, SPENT, mean_cost, runs_of
from reroute_jax.routing.divprune import DivPrune
from tests.evals.searching.stand_ins import Planner

SIZES = Counter({(8, 8): 3})
FOUND = {"seed": 4, "layers": [1, 5], "keep": [14, 7], "actions": ["reroute", "delete"]}


class Model(Planner):
    def cost(self, schedule, *, text, grid=None):
        assert grid in (None, (8, 8))
        return super().cost(schedule, text=text)


@pytest.mark.parametrize("equal", SPENT)
@pytest.mark.parametrize("behind", [None, "divprune:1/2"])
def test_what_is_set_by_hand_may_spend_more_and_never_less(equal, behind):
    model = Model()
    full, found, *by_hand = runs_of(model, {"2/9": {"searches": [FOUND], "behind": behind}}, SIZES, equal)
    assert (full.budget, found.name, found.budget) == ("", "found 2/9 seed 4", "2/9")
    assert found.schedule.merge == (None if behind is None else DivPrune(Fraction(1, 2)))
    assert [stage.lo for stage in found.schedule.decisions] == [1, 5]
    assert {one.name for one in by_hand} <= {f"{name} 2/9" for name in BY_HAND} and len(by_hand) > 5
    least = mean_cost(model, found.schedule, SIZES, SPENT[equal])
    for one in by_hand:
        assert least <= mean_cost(model, one.schedule, SIZES, SPENT[equal]) < 1.3 * least, one.name


def test_scoring_at_every_layer_leaves_fewer_tokens_at_equal_macs():
    found = {"1/3": {"searches": [FOUND | {"keep": [23, 14]}]}}
    tokens = {
        equal: {
            run.name: mean_cost(Model(), run.schedule, SIZES, SPENT["tokens"])
            for run in runs_of(Model(), found, SIZES, equal)
        }
        for equal in SPENT
    }
    assert tokens["macs"]["every reroute 1/3"] <= tokens["tokens"]["every reroute 1/3"]
