"""Candidates stay schedules that spend their budget, whatever moves are made."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.searching import candidates
from evals.searching.candidates import (
    HAND_SET,
    MOVES,
    Budget,
    Candidate,
    Space,
    child,
    fitted,
    merge_of,
    repaired,
    spending,
    starting,
)
from reroute_jax.errors import RerouteError
from reroute_jax.routing.divprune import DivPrune
from reroute_jax.routing.plan import Schedule
from tests.evals.searching.stand_ins import SPACE, Planner, budget

NINTH = Fraction(1, 9)


def full(candidate: Candidate, limit) -> bool:
    """Whether one more token, anywhere that deletions leave one, is too much."""
    for at, count in enumerate(candidate.keep):
        more = replace(candidate, keep=(*candidate.keep[:at], count + 1, *candidate.keep[at + 1 :]))
        allowed = candidates._capped(more.keep, more.actions, SPACE.visual) == more.keep
        if allowed and limit.holds(more):
            return False
    return True


@settings(max_examples=15, derandomize=True, deadline=None, database=None)
@given(st.integers(0, 10**6), st.sampled_from([Fraction(1, 3), Fraction(2, 9), NINTH]))
def test_a_child_spends_the_budget_and_no_more(seed, share):
    limit, rng = budget(share), np.random.default_rng(seed)
    parents = fitted(Planner(), HAND_SET, SPACE, limit)
    found = child(parents, SPACE, limit, rng, set(parents))
    assert found not in parents
    assert limit.holds(found) and full(found, limit)
    assert found.layers == tuple(sorted(set(found.layers))) and found.actions[-1] == "delete"


def test_every_move_makes_something_else():
    rng = np.random.default_rng(0)
    start = Candidate((1, 4, 8), (20, 9, 4), ("reroute", "delete", "delete"))
    for move in MOVES:
        moved = move(start, SPACE, rng)
        assert moved != start, move
        assert all(1 <= count <= 64 for count in moved.keep)
        assert len(moved.layers) == len(moved.keep) == len(moved.actions)


def test_a_single_decision_is_neither_dropped_nor_shifted():
    rng = np.random.default_rng(0)
    one = Candidate((1,), (5,), ("delete",))
    assert candidates._drop(one, SPACE, rng) == one == candidates._shift(one, SPACE, rng)


def test_repair_scales_every_count_alike_and_fills_up():
    """1/9 of 12 x 64 token-layers are 85: 64 in layer 0, and 21 for 11 layers."""
    limit = budget(NINTH)
    tall = Candidate((1, 6), (40, 10), ("reroute", "delete"))
    assert repaired(tall, SPACE, limit) == Candidate((1, 6), (3, 1), ("reroute", "delete"))
    early = Candidate((0, 6), (40, 10), ("reroute", "delete"))
    assert repaired(early, SPACE, limit) == Candidate((0, 6), (11, 3), ("reroute", "delete"))


def test_repair_never_keeps_what_was_deleted():
    limit = budget(Fraction(1, 3))
    rising = Candidate((0, 6), (4, 40), ("delete", "delete"))
    assert repaired(rising, SPACE, limit).keep == (21, 21)
    back = replace(rising, actions=("reroute", "delete"))
    assert repaired(back, SPACE, limit).keep == (3, 39)


def test_what_is_out_of_reach_is_none():
    assert repaired(Candidate((3,), (1,), ("delete",)), SPACE, budget(NINTH)) is None
    assert repaired(Candidate((), (), ()), SPACE, budget(NINTH)) is None


def test_a_schedule_and_back():
    schedule = Schedule.from_decisions((1, 5), (0.3, 0.1), 12, action="reroute")
    found = SPACE.candidate(schedule)
    assert found == Candidate((1, 5), (19, 6), ("reroute", "delete"))
    assert str(found) == "1:19 5:6d" and Candidate.parsed("1:19 5:6d") == found
    again = SPACE.schedule(found, "found 1/9")
    assert again.label == "found 1/9" and again.decisions[1].ratio == Fraction(6, 64)
    assert again.keep_counts([64, 48]).tolist() == [[19, 14], [6, 4]]


@pytest.mark.parametrize(("constraint", "share"), [("tokens", NINTH), ("macs", Fraction(2, 5)), ("kv", Fraction(2, 5))])
def test_constraints(constraint, share):
    """Text counts in compute and memory, so that a ninth of either is out of reach."""
    limit = budget(share, constraint)
    found = fitted(Planner(), HAND_SET, SPACE, limit)
    assert found and all(limit.holds(one) for one in found)
    if constraint != "tokens":
        assert fitted(Planner(), HAND_SET, SPACE, budget(NINTH, constraint)) == []


def test_scoring_counts_among_the_macs():
    spent = [budget(NINTH, constraint).spent for constraint in ("macs", "tokens")]
    few, many = (
        Candidate(layers, (6,) * len(layers), ("reroute",) * len(layers)) for layers in ((1,), tuple(range(1, 12)))
    )
    assert spent[1](few) == Fraction(64 + 11 * 6, 12 * 64)
    assert spent[1](few) == spent[1](many)
    assert spent[0](few) < spent[0](many)


def test_a_budget_that_nothing_set_by_hand_fits_has_starts_from_layers_0_and_1():
    """1/9 of 16 layers: the first decisions of people come at layers 2 and 3, behind which nothing is left."""
    model, space = Planner(), Space(16, 64)
    model.config = replace(model.config, decoder=replace(model.config.decoder, num_layers=16))
    limit = Budget(NINTH, spending(model, space, "tokens", text=16))
    assert fitted(model, HAND_SET, space, limit) == []
    found = starting(model, space, limit, [])
    assert {one.layers[0] for one in found} == {0, 1} and all(limit.holds(one) for one in found)
    assert Candidate((0,), (7,), ("delete",)) in found and Candidate((1,), (3,), ("delete",)) in found


def test_where_something_set_by_hand_fits_starts_are_those_and_the_same_from_layer_0_on():
    by_hand = fitted(Planner(), HAND_SET, SPACE, budget(NINTH))
    found = starting(Planner(), SPACE, budget(NINTH), by_hand)
    assert found[: len(by_hand)] == by_hand and {one.layers[0] for one in found[len(by_hand) :]} == {0}


@pytest.mark.parametrize(("share", "constraint"), [(Fraction(1, 65), "tokens"), (NINTH, "kv")])
def test_a_budget_below_one_token_a_layer_is_refused(share, constraint):
    with pytest.raises(RerouteError, match=f"one visual token in every layer .* the budget of {share}: raise --budget"):
        starting(Planner(), SPACE, budget(share, constraint), [])


def test_a_space_behind_a_reduction():
    """Of 64 tokens 32 are left: a decision cannot keep more, and layers before the first one run no more."""
    space = Space.of(Planner(), merge_of(Planner(), "divprune:1/2"))
    limit = Budget(NINTH, spending(Planner(), space, "tokens", text=16))
    assert (space.visual, space.merge, space.token_layers) == (32, DivPrune(Fraction(1, 2)), 12 * 64)
    assert limit.spent(Candidate((1,), (8,), ("delete",))) == Fraction(32 + 11 * 8, 12 * 64)
    found = fitted(Planner(), HAND_SET, space, limit)
    most = max(map(limit.spent, found))
    assert found and NINTH - Fraction(12, 12 * 64) < most <= NINTH
    for candidate in found:
        schedule = space.schedule(candidate)
        assert schedule.merge == space.merge and space.candidate(schedule) == candidate
        assert Planner().cost(schedule, text=16).average == pytest.approx(float(64 * limit.spent(candidate)))


def test_a_reduction_counts_among_the_macs():
    space = Space.of(Planner(), merge_of(Planner(), "divprune:1/2"))
    candidate, full = Candidate((0,), (8,), ("delete",)), Planner().cost(Planner().plan("none"), text=16)
    cost = Planner().cost(space.schedule(candidate), text=16)
    spent = spending(Planner(), space, "macs", text=16)(candidate)
    assert cost.merging > 0 and spent == Fraction(cost.prompt.total() + cost.merging, full.prompt.total())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nuwa:1/9", "nuwa:1/9 is no reduction before the decoder alone"),
        ("fastv:1/3", "fastv:1/3 is no reduction before the decoder alone"),
        ("divprune", "budget is None, expected one of 192, 128, 64 or a share"),
        ("divprune:1/2:delete", "divprune:1/2:delete is no reduction before the decoder alone"),
        ("divprune:half", "'half' is neither 192, 128, 64 nor a share"),
        ("dlvprune:1/2", "'dlvprune', expected one of"),
    ],
)
def test_what_is_no_reduction_is_told(text, said):
    with pytest.raises(RerouteError, match=said):
        merge_of(Planner(), text)
