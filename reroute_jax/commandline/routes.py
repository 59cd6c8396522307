"""The arguments that name a route: a method with its switches, a released configuration, or a schedule's file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from reroute_jax.commandline.parsing import DEFECT, ROUTE, SWITCH, Parser, budget
from reroute_jax.errors import RerouteError
from reroute_jax.routing.found import FOUND
from reroute_jax.routing.methods import METHODS
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.presets import preset
from reroute_jax.routing.stages import ACTIONS
from reroute_jax.routing.switches import SWITCHES, Switch

DEFAULT_ACTION, DEFAULT_BUDGET = "reroute", 128
# --seed is a command's own: it draws more than the scores of the method `random`.
SWITCH_ARGUMENTS = tuple(name for name in SWITCHES if name != "seed")


def add_route_arguments(parser: Parser, default_method: str) -> None:
    """--method, --action, --budget, --preset, --schedule and the switches. All are None unless given; default_method:
    for --help, what the command takes then."""
    route = parser.group(ROUTE)
    route.add_argument("--method", choices=(*METHODS, FOUND), help=f"(default: {default_method})")
    route.add_argument("--action", choices=ACTIONS, help=f"(default: {DEFAULT_ACTION})")
    route.add_argument(
        "--budget",
        type=budget,
        help="192, 128 or 64 (1/3, 2/9, 1/9 of an image's visual tokens, averaged over the decoder layers) or a share "
        f"such as 0.15 or 1/9 (default: {DEFAULT_BUDGET})",
    )
    route.add_argument("--preset", metavar="NAME", help="a released configuration, instead of all other ways to route")
    route.add_argument("--schedule", metavar="FILE", help="a schedule that was written down, instead of all other ways")
    for name in SWITCH_ARGUMENTS:
        switch = SWITCHES[name]
        parser.group(DEFECT if switch.defect else SWITCH).add_argument(flag(name), default=None, **_argument(switch))


def flag(name: str) -> str:
    """The argument of a switch, as it is typed."""
    return f"--{name.replace('_', '-')}"


def given_switches(args: argparse.Namespace) -> dict[str, Any]:
    """The switches that were given, as `plan` takes them."""
    return {name: value for name in SWITCH_ARGUMENTS if (value := getattr(args, name)) is not None}


def given_route(args: argparse.Namespace) -> list[str]:
    """Names of the arguments that were given, --preset and --schedule aside."""
    return [name for name in ("method", "action", "budget", *SWITCH_ARGUMENTS) if getattr(args, name) is not None]


def check_fixed(args: argparse.Namespace, others: Sequence[str]) -> None:
    """Raises RerouteError where --preset or --schedule meets another way to route. others: such arguments, given."""
    fixed = [name for name in ("preset", "schedule") if getattr(args, name) is not None]
    if fixed and (surplus := [*fixed[1:], *others]):
        raise RerouteError(f"{flag(fixed[0])} fixes the whole schedule, leave out {', '.join(map(flag, surplus))}")


def fixed_schedule(args: argparse.Namespace, num_layers: int) -> Schedule | None:
    """What --preset or --schedule names, None without them. A schedule without a label is called by its file.

    Raises RerouteError for one that is not for `num_layers` layers.
    """
    if args.preset is not None:
        return preset(args.preset, num_layers)
    if args.schedule is None:
        return None
    schedule = Schedule.from_file(args.schedule)
    schedule.check_depth(num_layers)
    return replace(schedule, label=schedule.label or Path(args.schedule).stem)


def _argument(switch: Switch) -> dict[str, Any]:
    family = f" on {switch.family}" if switch.family else ""
    default = "" if switch.default is None else f" (default: {_shown(switch.default)})"
    # argparse formats help with %.
    text = f"{', '.join(switch.methods)}{family}: {switch.about}{default}".replace("%", "%%")
    if switch.kind is bool:
        return {"action": argparse.BooleanOptionalAction, "help": text}
    return {"type": switch.kind, "choices": switch.choices or None, "help": text}


def _shown(value: object) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
