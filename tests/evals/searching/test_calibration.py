"""What calibration keeps in memory."""

from __future__ import annotations

import pytest

from evals.searching.calibration import kept_layers
from reroute_jax.errors import RerouteError
from tests.evals.searching.stand_ins import Planner

ONE = 10 * 100 * 128 * 4  # bytes before one layer of 10 prompts with 100 slots: hidden size 128, fp32


@pytest.mark.parametrize(
    ("limit", "kept"),
    [(12 * ONE, tuple(range(12))), (3 * ONE, (0, 4, 8)), (11 * ONE, (0, 2, 4, 6, 8, 10)), (ONE, (0,))],
)
def test_as_many_layers_as_fit_evenly_spaced_from_0_on(limit, kept):
    assert kept_layers(Planner(), 10, 100, limit) == kept


def test_a_limit_that_holds_no_layer_is_told():
    with pytest.raises(RerouteError, match="10 prompts of 100 slots take"):
        kept_layers(Planner(), 10, 100, ONE - 1)
