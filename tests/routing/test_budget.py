"""Budgets as text, from command lines and from strangers."""

from dataclasses import asdict
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from reroute_jax.engine.model import Model
from reroute_jax.errors import RerouteError
from reroute_jax.routing.budget import parsed_budget, share_of
from reroute_jax.routing.switches import Switches, numbers
from reroute_jax.serving.plans import planned
from tests.evals.stub import StubModel


class Planner(Model):
    """Plans, and has nothing to run."""

    def __init__(self) -> None:
        pass

    def plan(self, method: str, **options):
        return StubModel().plan(method, **options)


@pytest.mark.parametrize(
    ("text", "budget"),
    [("192", 192), ("2/9", Fraction(2, 9)), ("0.15", Fraction(3, 20)), ("1e-3", Fraction(1, 1000)), (".5", 1 / 2)],
)
def test_a_budget_is_exact(text, budget):
    assert parsed_budget(text) == budget


@pytest.mark.parametrize(
    "text",
    ["", "200%", "much", "nan", "inf", "1/0", "2/9/1", "1e999999999", "1e-999999999", "1e-9_999_999", "9" * 5000],
    ids=lambda text: text[:14],
)
def test_what_is_none_is_one_short_line_at_once(text):
    """The large exponents would take all memory for their digits."""
    with pytest.raises(RerouteError, match="neither 192, 128, 64 nor a share") as error:
        parsed_budget(text)
    assert len(str(error.value)) < 120
    with pytest.raises(ValueError):
        numbers(f"3,{text}")


@pytest.mark.parametrize(
    "wrong",
    [
        *({"first_decision": "3"}, {"first_decision": 2.5}, {"stride": "3"}, {"stride": 2.5}, {"seed": True}),
        *({"decisions": 5}, {"first_image_only": "yes"}, {"position_mode": None}, {"keep_ratio": "0.5"}),
        *({"layers": ("a",)}, {"layers": (2.5,)}, {"keep": (float("nan"),)}, {"keep": ("0.5",)}, {"keep": (True,)}),
    ],
    ids=str,
)
def test_a_switch_of_another_type_is_refused(wrong):
    """Where annotations are not checked, as in tests they are."""
    given = SimpleNamespace(**{**asdict(Switches()), **wrong})
    with pytest.raises(RerouteError, match=f"{next(iter(wrong))} (is|are) .*, expected") as error:
        Switches.__post_init__(given)
    assert "\n" not in str(error.value)


def test_numbers_of_every_library_are_budgets_and_switches():
    for budget in (np.float32(0.2), np.float64(0.2), Decimal("0.2"), 0.2, Fraction(1, 5)):
        assert share_of(budget, 64) == Fraction(1, 5)
    for budget in (np.int64(128), 128.0, Fraction(128)):
        assert share_of(budget, 64) == Fraction(2, 9)
    for budget in ([128], "128", True, float("nan"), 1, 0, -0.5, 2, None):
        with pytest.raises(RerouteError, match="budget is"):
            share_of(budget, 64)
    Switches.__post_init__(
        SimpleNamespace(**{**asdict(Switches()), "first_decision": np.int64(3), "seed": np.int64(3)})
    )


@pytest.mark.parametrize("method", ["pdrop", "pool"])
def test_a_server_takes_no_budget_of_0_for_the_default(method):
    with pytest.raises(RerouteError, match="budget is 0"):
        planned(Planner(), method, 0, None, {})
    assert planned(Planner(), method, None, None, {}).budget == Fraction(2, 9)
