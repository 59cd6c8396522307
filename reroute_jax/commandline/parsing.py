"""A command's parser, the types of its arguments, and its exit code."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NoReturn

from reroute_jax.errors import RerouteError

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
BAD_INPUT = 2

# The groups of a command's help, in its order.
RUN = "what to run"
DATA = "on what"
ROUTE = "how to route"
SWITCH = "switches of methods (each is refused where the method has no use for it)"
DEFECT = "defects of a release, to reproduce its numbers"
OUTPUT = "output"
GROUPS = (RUN, DATA, ROUTE, SWITCH, DEFECT, OUTPUT)


class Parser(argparse.ArgumentParser):
    """argparse with its errors on one line, the groups of `GROUPS`, and examples below its help.

    module: what follows `python -m`. examples: arguments of the command, each printed as a whole command line.
    """

    def __init__(self, module: str, description: str, examples: Sequence[str] = ()) -> None:
        command = f"python -m {module}"
        shown = "\n".join(["examples:", *(f"  {command} {example}".rstrip() for example in examples)])
        super().__init__(
            prog=command,
            description=description,
            epilog=shown if examples else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self._titled = {title: self.add_argument_group(title) for title in GROUPS}

    def group(self, title: str) -> argparse._ArgumentGroup:
        """The argument group of a title in `GROUPS`; help leaves it out while it is empty."""
        return self._titled[title]

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"error: {message} ({self.prog} --help)\n")


def exit_code(command: Callable[[], int | None], interrupted: str = "stopped") -> int:
    """Run `command`: its own code (None counts as 0), or 2 after one line on bad input, or 130 after the line
    `interrupted` on Ctrl-C."""
    try:
        return command() or 0
    except (RerouteError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return INTERRUPTED


def positive(text: str) -> int:
    """argparse type: a whole number from 1 on."""
    return whole(text, 1)


def whole(text: str, least: int = 0) -> int:
    """argparse type: a whole number from `least` on."""
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
    return int(text)


def positive_number(text: str) -> float:
    """argparse type: a finite number above zero."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def budget(text: str) -> int | Fraction:
    """argparse type: 192, 128, 64, or a share of the visual tokens."""
    try:
        return int(text) if text.isdigit() else Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is neither 192, 128, 64 nor a share such as 0.15 or 1/9") from None
