"""The runs that a command's arguments ask for."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import Any

from evals.harness.runner import Answerer, Run
from reroute_jax.commandline.parsing import ROUTE, Parser
from reroute_jax.commandline.routes import (
    DEFAULT_ACTION,
    DEFAULT_BUDGET,
    check_fixed,
    fixed_schedule,
    given_route,
    given_switches,
)
from reroute_jax.errors import RerouteError
from reroute_jax.routing.found import FOUND, found_file
from reroute_jax.routing.methods import METHODS
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.switches import AMOUNTS, SWITCHES

FULL = "full"
CONTROLS = ("random", "uniform", "pool", "layout")

DEFAULT_METHOD = "nuwa"


@dataclass(frozen=True)
class Routes:
    """runs: the full one first. contrasts: pairs of run names whose differences the report gives. Raises RerouteError
    for two runs of one name, which would be one file of answers."""

    runs: tuple[Run, ...]
    contrasts: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        names = [run.name.lower() for run in self.runs]  # some disks have one file for Full and full
        if twice := [name for name in names if names.count(name) > 1]:
            raise RerouteError(
                f"two runs are called {twice[0]}: give budgets that differ in their first four digits, or other labels"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """JSON form of every schedule, by run."""
        return {run.name: run.schedule.to_record() for run in self.runs}


def add_comparison_arguments(parser: Parser) -> None:
    """--compare and --controls."""
    route = parser.group(ROUTE)
    route.add_argument("--compare", action="store_true", help="all tokens, deletion and reroute on the same questions")
    route.add_argument("--controls", action="store_true", help=f"with --compare: also {', '.join(CONTROLS)}")


def check_routes(args: argparse.Namespace) -> None:
    """Raises RerouteError for arguments that contradict each other, before anything is loaded."""
    check_fixed(args, [*given_route(args), *["compare"] * args.compare])
    if args.method == FOUND and args.action is not None:
        raise RerouteError("a schedule that was found has actions of its own, leave out --action")
    if args.controls and not args.compare:
        raise RerouteError("--controls adds runs to a comparison, give --compare too")
    if not args.compare:
        return
    if args.action is not None:
        raise RerouteError("--compare runs both actions, leave out --action")
    both = [name for name, method in METHODS.items() if method.has_actions]
    if args.method is not None and args.method not in both:
        raise RerouteError(f"--compare needs a method that deletes and reroutes, expected one of: {', '.join(both)}")


def plan_routes(args: argparse.Namespace, model: Answerer) -> Routes:
    """The runs that `args` ask for on `model`, the run with all tokens always among them. Raises as `Routes` does."""
    method, action = args.method or DEFAULT_METHOD, args.action or DEFAULT_ACTION
    full = Run(FULL, model.plan("none"))
    fixed = fixed_schedule(args, model.config.num_layers)
    if fixed is not None:
        return Routes((full, named_run(fixed)) if fixed.decisions or fixed.merge else (full,), ())
    if not args.compare:
        routed = _planned(args, model, method, action)
        return Routes((full,) if method == "none" else (full, routed), ())
    delete, reroute = (_planned(args, model, method, action, one_of_two=True) for action in ("delete", "reroute"))
    names = [name for name in CONTROLS if args.controls and name != method]
    controls = [_planned(args, model, name, "reroute", control=True) for name in names]
    contrasts = [(reroute.name, delete.name), *((control.name, reroute.name) for control in controls)]
    return Routes((full, delete, reroute, *controls), tuple(contrasts))


def _planned(
    args: argparse.Namespace, model: Answerer, method: str, action: str, one_of_two: bool = False, control: bool = False
) -> Run:
    """one_of_two: the other action runs as well and takes its own switches; control: so does the method."""
    switches = given_switches(args)
    if one_of_two:
        switches = {name: v for name, v in switches.items() if SWITCHES[name].action in (None, action)}
    if control:
        switches = {name: value for name, value in switches.items() if method in SWITCHES[name].methods}
    if method in SWITCHES["seed"].methods:
        switches["seed"] = args.seed
    share = args.budget
    if share is None and not set(AMOUNTS) & set(switches):
        share = DEFAULT_BUDGET
    asked = switches if method == FOUND else switches | {"action": action}
    return named_run(model.plan(method, budget=share, **asked))


def beside_found(routes: Routes, args: argparse.Namespace, model: Answerer) -> Routes:
    """With the run of what a search found for the asked budget, where the checkpoint comes with it: what the model can
    do beside what one method was asked to."""
    otherwise = args.compare or args.preset is not None or args.schedule is not None
    if otherwise or args.method in ("none", FOUND) or set(AMOUNTS) & set(given_switches(args)):
        return routes
    budget = args.budget or DEFAULT_BUDGET
    if not found_file(model.folder, budget).is_file():
        return routes
    return Routes((*routes.runs, named_run(model.plan(FOUND, budget=budget))), routes.contrasts)


def named_run(schedule: Schedule) -> Run:
    """The run of a schedule, called by its label."""
    return Run(re.sub(r"[^\w.=]+", "-", schedule.label), schedule)
