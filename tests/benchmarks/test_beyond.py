"""What is made of a found schedule: parts where they have room, and equal tokens."""

from __future__ import annotations

from fractions import Fraction

import pytest

from benchmarks.beyond import token_layers, variants
from evals.searching.candidates import Candidate, Space
from reroute_jax.errors import RerouteError
from reroute_jax.routing.divprune import DivPrune
from reroute_jax.routing.floors import StrideGrid
from reroute_jax.routing.pool import PoolMerge

SPACE = Space(12, 64)
FOUND = Candidate((1, 4, 9), (5, 29, 9), ("reroute", "reroute", "delete"))
TOKENS = 64 + 3 * 5 + 5 * 29 + 3 * 9


@pytest.fixture(scope="module")
def made():
    return variants(SPACE.schedule(FOUND), (8, 8))


def test_a_grid_stands_inside_the_count_of_decisions_that_have_room_for_it(made):
    assert [stage.floor for stage in made["grid of stride 4"].decisions] == [None, StrideGrid(4), StrideGrid(4)]
    assert [stage.floor for stage in made["grid of stride 3"].decisions] == [None, StrideGrid(3), None]
    for name in ("grid of stride 3", "grid of stride 4"):
        assert token_layers(made[name], SPACE) == TOKENS


@pytest.mark.parametrize(
    ("name", "merge", "left"),
    [
        ("divprune 3/4", DivPrune(Fraction(3, 4)), 48),
        ("divprune 1/2", DivPrune(Fraction(1, 2)), 32),
        ("pool 3/4", PoolMerge(Fraction(3, 4)), 48),
        ("pool 1/2", PoolMerge(Fraction(1, 2)), 30),
    ],
)
def test_decisions_behind_a_merge_take_what_the_layers_before_them_save(made, name, merge, left):
    schedule = made[name]
    assert schedule.merge == merge and merge.anchors(64, (8, 8)) == left
    assert [stage.lo for stage in schedule.decisions] == [1, 4, 9]
    assert TOKENS - 3 < token_layers(schedule, Space(12, left)) <= TOKENS
    assert schedule.keep_counts([left]).sum() > 5 + 29 + 9


def test_proxies_are_paid_for(made):
    proxies, mean = made["proxy_offset"], made["mean_offset"]
    assert [stage.repair for stage in proxies.decisions] == ["proxy_offset", "proxy_offset", None]
    assert TOKENS - 3 < token_layers(proxies, SPACE) <= TOKENS
    assert proxies.keep_counts([64]).sum() < mean.keep_counts([64]).sum() == 5 + 29 + 9


def test_a_schedule_that_never_reroutes_has_nothing_to_repair():
    made = variants(SPACE.schedule(Candidate((1, 4), (20, 8), ("delete", "delete"))), (8, 8))
    assert "proxy_offset" not in made and "mean_offset" not in made and "divprune 1/2" in made


def test_too_few_tokens_are_told():
    tight = Candidate(tuple(range(1, 12)), (1,) * 11, ("reroute",) * 11)
    with pytest.raises(RerouteError, match="cannot spend 75 token-layers of 768: take a larger --budget"):
        variants(SPACE.schedule(tight), (8, 8))
