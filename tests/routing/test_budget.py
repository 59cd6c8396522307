"""Budgets as text, from command lines and from strangers."""

from fractions import Fraction

import pytest

from reroute_jax.engine.model import Model
from reroute_jax.errors import RerouteError
from reroute_jax.routing.budget import parsed_budget
from reroute_jax.routing.switches import numbers
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


@pytest.mark.parametrize("method", ["pdrop", "pool"])
def test_a_server_takes_no_budget_of_0_for_the_default(method):
    with pytest.raises(RerouteError, match="budget is 0"):
        planned(Planner(), method, 0, None, {})
    assert planned(Planner(), method, None, None, {}).budget == Fraction(2, 9)
