"""Which schedules compete with those that were found, and what they may spend."""

from collections import Counter
from fractions import Fraction

import pytest

from benchmarks.found_schedules import (
    BOXES,
    BY_HAND,
    MINUS_FIRST,
    SPENT,
    accounts_of,
    markdown,
    mean_cost,
    runs_of,
    summary_of,
)
from reroute_jax.errors import RerouteError
from reroute_jax.routing.divprune import DivPrune
from tests.evals.searching.stand_ins import Planner

SIZES = Counter({(8, 8): 3})
FOUND = {"seed": 4, "layers": [1, 5], "keep": [14, 7], "actions": ["reroute", "delete"]}


class Model(Planner):
    def cost(self, schedule, *, text, grid=None):
        assert grid in (None, (8, 8))
        return super().cost(schedule, text=text)


def told(behind=None, tasks=("refcoco",)):
    return {"budget": "2/9", "searches": [FOUND], "behind": behind, "hand_set": "2:8d 6:6", "tasks": list(tasks)}


def cost(schedule, of: str) -> float:
    return mean_cost(accounts_of(Model(), schedule, SIZES), SIZES, SPENT[of])


@pytest.mark.parametrize("equal", SPENT)
@pytest.mark.parametrize("behind", [None, "divprune:1/2"])
def test_what_is_set_by_hand_may_spend_more_and_never_less(equal, behind):
    model = Model()
    full, found, *by_hand = runs_of(model, [told(behind)], SIZES, equal)
    if behind is not None:
        held_against, *by_hand = by_hand
        assert held_against.name == "by hand 2/9 behind divprune:1/2" and held_against.schedule.merge is not None
        assert [stage.lo for stage in held_against.schedule.decisions] == [2, 6]
    assert (full.budget, found.name.removesuffix(f" behind {behind}"), found.budget) == ("", "found 2/9 seed 4", "2/9")
    assert found.schedule.merge == (None if behind is None else DivPrune(Fraction(1, 2)))
    assert [stage.lo for stage in found.schedule.decisions] == [1, 5]
    assert {one.name for one in by_hand} <= {f"{name} 2/9" for name in BY_HAND} and len(by_hand) > 5
    least = cost(found.schedule, equal)
    for one in by_hand:
        assert least <= cost(one.schedule, equal) < 1.3 * least, one.name


def test_scoring_at_every_layer_leaves_fewer_tokens_at_equal_macs():
    found = [told() | {"budget": "1/3", "searches": [FOUND | {"keep": [23, 14]}]}]

    def tokens(equal: str) -> float:
        (every,) = (run for run in runs_of(Model(), found, SIZES, equal) if run.name == "every reroute 1/3")
        return cost(every.schedule, "tokens")

    assert tokens("macs") < tokens("tokens")


def test_what_was_found_is_held_against_the_best_by_hand_and_the_first_found():
    model = Model()
    files = [told(), told("divprune:1/2")]
    runs = runs_of(model, files, SIZES)
    hits = {run.name: 0.0 for run in runs} | {runs[1].name: 1.0, runs[2].name: 0.5, runs[3].name: 0.25}
    lines = [{"scene": str(k), "metrics": {name: {BOXES: hit} for name, hit in hits.items()}} for k in range(4)]
    summary = summary_of(model, runs, lines, (BOXES,), SIZES)
    best = {
        name: (pair[BOXES]["best"], pair[BOXES]["value"])
        for name, pair in summary["found minus the best by hand"].items()
    }
    assert best == {runs[1].name: (runs[3].name, 0.75), runs[2].name: (runs[3].name, 0.25)}
    assert {name: pair[BOXES]["value"] for name, pair in summary[MINUS_FIRST].items()} == {runs[2].name: -0.5}
    rows = {line.split(" | ")[0]: line for line in markdown(summary, (BOXES,)).splitlines()}
    assert "+75.0" in rows[f"| {runs[1].name}"] and rows[f"| {runs[2].name}"].endswith("| -50.0 (-50.0 to -50.0) |")
    with pytest.raises(RerouteError, match="found 2/9 seed 4 is in two files"):
        runs_of(model, files[:1] * 2, SIZES)


def test_what_was_searched_on_other_prompts_is_called_so():
    runs = runs_of(Model(), [told(), told(tasks=("refcoco", "scenes_vqa"))], SIZES)
    assert [run.name for run in runs[1:3]] == ["found 2/9 seed 4", "found 2/9 seed 4 for refcoco+scenes_vqa"]
