"""Command-line arguments that say how visual tokens are routed, and the runs they ask for."""

from __future__ import annotations

import argparse
import re
from argparse import BooleanOptionalAction
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from evals.harness.runner import Answerer, Run
from reroute_jax.errors import RerouteError
from reroute_jax.routing.methods import METHODS
from reroute_jax.routing.plan import ACTIONS, POSITION_MODES, SIM_ORDERS, Schedule
from reroute_jax.routing.presets import preset

FULL = "full"
CONTROLS = ("random", "uniform", "pool", "layout")

DEFAULT_METHOD, DEFAULT_ACTION, DEFAULT_BUDGET = "nuwa", "reroute", 128
# Switches of `reroute_jax.routing.methods.plan`, given on as they are: the arguments that argparse gets for each.
SWITCHES: Mapping[str, dict[str, Any]] = {
    "decisions": {"help": "'every' or 'every:K': decide at every layer, or every K-th, from the method's first one on"},
    "first_decision": {"type": int, "help": "fastv, pdrop and the controls: layer of the first decision"},
    "ratios": {
        "choices": ("solved", "official"),
        "help": "keep ratios solved for this model and budget, or the released ones",
    },
    "score_source": {
        "choices": ("own_layer", "previous_layer"),
        "help": "attention that ranks the tokens (deletion)",
    },
    "position_mode": {"choices": POSITION_MODES, "help": "keep token positions, or renumber after each decision"},
    "variant": {"choices": ("flat", "pyramid"), "help": "nuwa: where its reroute decides"},
    "nuwa_first_score": {"choices": ("own_layer", "host"), "help": "nuwa: attention at its first reroute decision"},
    "self_weight_override": {
        "action": BooleanOptionalAction,
        "help": "nuwa on LLaVA: overwrite the self weight of merged tokens, as released",
    },
    "keep_ratio": {"type": float, "help": "nuwa on Qwen: a released ratio, 0.25, 0.5 or 0.75, instead of a budget"},
    "qwen_sim_order": {"choices": SIM_ORDERS, "help": "nuwa on Qwen: 'window' repeats a defect of the release"},
    "qwen_layer14_causal": {
        "action": BooleanOptionalAction,
        "help": "nuwa on Qwen: --no-qwen-layer14-causal repeats a defect of the release",
    },
    "first_image_only": {"action": BooleanOptionalAction, "help": "of several images in a row, route the first one"},
}
_SWITCHES_OF_ONE_ACTION = {"variant": "reroute", "nuwa_first_score": "reroute", "score_source": "delete"}


@dataclass(frozen=True)
class Routes:
    """runs: the full one first. contrasts: pairs of run names whose differences the report gives."""

    runs: tuple[Run, ...]
    contrasts: tuple[tuple[str, str], ...]

    @property
    def settings(self) -> dict[str, Any]:
        """JSON form of every schedule, by run."""
        return {run.name: _record(run.schedule) for run in self.runs}


def add_route_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=tuple(METHODS), help=f"default: {DEFAULT_METHOD}")
    parser.add_argument("--action", choices=ACTIONS, help=f"default: {DEFAULT_ACTION}")
    parser.add_argument(
        "--budget",
        type=budget,
        help="192, 128 or 64 (1/3, 2/9, 1/9 of an image's visual tokens, averaged over the decoder layers) or a share "
        f"such as 0.15 or 1/9 (default: {DEFAULT_BUDGET})",
    )
    for name, how in SWITCHES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=None, **how)
    parser.add_argument("--preset", help="a released configuration by its name, instead of method, action and budget")
    parser.add_argument("--compare", action="store_true", help="all tokens, deletion and reroute on the same questions")
    parser.add_argument("--controls", action="store_true", help=f"with --compare: also {', '.join(CONTROLS)}")


def budget(text: str) -> int | Fraction:
    """argparse type of --budget."""
    try:
        return int(text) if text.isdigit() else Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is neither 192, 128, 64 nor a share such as 0.15 or 1/9") from None


def check_routes(args: argparse.Namespace) -> None:
    """Raises RerouteError for arguments that contradict each other, before anything is loaded."""
    given = [name for name in ("method", "action", "budget", *SWITCHES) if getattr(args, name) is not None]
    if args.preset is not None and (given or args.compare):
        what = ", ".join(f"--{name.replace('_', '-')}" for name in [*given, *["compare"] * args.compare])
        raise RerouteError(f"--preset fixes the whole schedule, leave out {what}")
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
    """The runs that `args` ask for on `model`, the run with all tokens always among them."""
    method, action = args.method or DEFAULT_METHOD, args.action or DEFAULT_ACTION
    full = Run(FULL, model.plan("none"))
    if args.preset is not None:
        routed = named_run(preset(args.preset, model.config.num_layers))
        return Routes((full, routed) if routed.schedule.decisions else (full,), ())
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
    switches = {name: value for name in SWITCHES if (value := getattr(args, name)) is not None}
    if one_of_two:
        switches = {name: v for name, v in switches.items() if _SWITCHES_OF_ONE_ACTION.get(name, action) == action}
    if control:
        switches = {name: value for name, value in switches.items() if name in METHODS[method].switches}
    if "seed" in METHODS[method].switches:
        switches["seed"] = args.seed
    share = args.budget
    if share is None and "keep_ratio" not in switches:
        share = DEFAULT_BUDGET
    return named_run(model.plan(method, budget=share, action=action, **switches))


def named_run(schedule: Schedule) -> Run:
    """The run of a schedule, called by its label."""
    return Run(re.sub(r"[^\w.=]+", "-", schedule.label), schedule)


def _record(schedule: Schedule) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, Fraction):
            return str(value)
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    merge = {"kind": type(schedule.merge).__name__} if schedule.merge is not None else {}
    record = plain(asdict(schedule))
    return record | {"merge": merge | record["merge"]} if merge else record
