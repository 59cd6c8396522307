"""Schedules that a search found for a checkpoint, in its folder: one file for each budget."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from reroute_jax.errors import RerouteError
from reroute_jax.routing.budget import parsed_budget, share_of
from reroute_jax.routing.plan import Schedule

FOUND = "found"  # what commands and `Model.plan` take for a method
_PREFIX = "found_"


def found_schedule(folder: Path, budget: int | float | Fraction | str | None = None, **others) -> Schedule:
    """The one that was found for exactly this budget. Raises RerouteError where there is none, and for anything else
    that is asked of it."""
    if others:
        raise RerouteError(f"method {FOUND!r} has no use for {', '.join(others)}, it takes a budget alone")
    file = found_file(folder, budget)
    if not file.is_file():
        there = ", ".join(sorted(map(_share, folder.glob(f"{_PREFIX}*.json"))))
        raise RerouteError(
            f"{folder.name} has no schedule that was found for a budget of {_share(file)} (it has {there or 'none'}): "
            "make one with `python -m evals.search`"
        )
    return Schedule.from_file(file)


def found_file(folder: Path, budget: int | float | Fraction | str | None) -> Path:
    """Where it stands, if anywhere. Raises RerouteError for what is no budget."""
    share = share_of(parsed_budget(budget) if isinstance(budget, str) else budget, 10**6)
    return folder / f"{_PREFIX}{share.numerator}-{share.denominator}.json"


def _share(file: Path) -> str:
    return file.stem.removeprefix(_PREFIX).replace("-", "/")


def is_found(file: Path) -> bool:
    """Whether the file is such a schedule, which no answer under another one depends on."""
    return file.name.startswith(_PREFIX) and file.suffix == ".json"
