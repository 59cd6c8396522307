"""The plans that a server is started with, and the one that a request asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from reroute_jax.commandline.routes import DEFAULT_ACTION, DEFAULT_BUDGET
from reroute_jax.engine.model import Model
from reroute_jax.errors import RerouteError, one_of
from reroute_jax.routing.budget import TIERS, parsed_budget
from reroute_jax.routing.found import FOUND
from reroute_jax.routing.methods import METHODS
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.switches import AMOUNTS

WORDS = ("method", "budget", "action")


@dataclass(frozen=True)
class Plan:
    """method, budget, action: the words that a request may name it by, None where it has none. budget: of the visual
    tokens, the share that runs in a layer on average."""

    method: str
    budget: Fraction | None
    action: str | None
    schedule: Schedule

    @property
    def words(self) -> dict[str, str]:
        """As JSON shows them."""
        return {word: str(value) for word in WORDS if (value := getattr(self, word)) is not None}

    @property
    def name(self) -> str:
        return " ".join(self.words.values())


def planned(
    model: Model, method: str, budget: int | Fraction | None, action: str | None, switches: Mapping[str, Any]
) -> Plan:
    """budget, action: None for the defaults. Raises RerouteError for what `Model.plan` refuses."""
    budgeted = method == FOUND or METHODS[method].has_budget
    asked = DEFAULT_BUDGET if budget is None else budget
    amount = asked if budgeted and not set(AMOUNTS) & set(switches) else None
    acts = method != FOUND and METHODS[method].has_actions
    action = (action or DEFAULT_ACTION) if acts else None
    given = {"action": action} if acts else {}
    schedule = model.plan(method, budget=amount, **given, **switches)
    return Plan(method, None if amount is None else share(amount), action, schedule)


def share(budget: int | Fraction) -> Fraction:
    return Fraction(TIERS.get(budget, budget))


def plan_words(text: str) -> tuple[str, int | Fraction | None, str | None]:
    """ "METHOD", "METHOD:BUDGET" or "METHOD:BUDGET:ACTION". Raises RerouteError for anything else."""
    method, *more = text.split(":")
    one_of("a plan's method", method, (*METHODS, FOUND))
    if len(more) > 2:
        raise RerouteError(f"{text!r} is no plan, expected METHOD:BUDGET:ACTION")
    budget, action = [*more, None, None][:2]
    return method, parsed_budget(budget) if budget else None, action


def plan_asked_for(plans: Sequence[Plan], routing: Any) -> Plan:
    """The first plan that is what a request's `routing` names of it; the first of all where it names nothing.

    Raises RerouteError where there is none, naming all.
    """
    if routing is None:
        return plans[0]
    if not isinstance(routing, dict) or set(routing) - set(WORDS):
        raise RerouteError(f"routing is no object of {', '.join(WORDS)}")
    asked = {word: value for word, value in routing.items() if value is not None}
    if "budget" in asked:
        asked["budget"] = share(parsed_budget(str(asked["budget"])))
    for plan in plans:
        if all(getattr(plan, word) == value for word, value in asked.items()):
            return plan
    known = ", ".join(plan.name for plan in plans)
    raise RerouteError(f"routing names no plan of this server, expected one of: {known}")
