"""A command's parser, the types of its arguments, and its exit code."""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import wraps
from typing import Any, NoReturn, TypeVar

from reroute_jax.buckets import MOST_NEW_TOKENS
from reroute_jax.commandline.failures import one_line
from reroute_jax.errors import RerouteError
from reroute_jax.routing.budget import parsed_budget

T = TypeVar("T")

INTERRUPTED, NO_READER = 130, 141  # 128 + SIGINT, 128 + SIGPIPE, as a shell reports them
BAD_INPUT = 2

# The groups of a command's help, in its order.
RUN = "what to run"
DATA = "on what"
ROUTE = "how to route"
SWITCH = "switches of methods (each is refused where the method has no use for it)"
DEFECT = "defects of a release, to reproduce its numbers"
SERVE = "who is served"
OUTPUT = "output"
GROUPS = (RUN, DATA, ROUTE, SWITCH, DEFECT, SERVE, OUTPUT)


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
        self.add_argument("--debug", action="store_true", help="show where an error came from")
        self._titled = {title: self.add_argument_group(title) for title in GROUPS}

    def group(self, title: str) -> argparse._ArgumentGroup:
        """The argument group of a title in `GROUPS`; help leaves it out while it is empty."""
        return self._titled[title]

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        _escape_unprintable()
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"error: {message} ({self.prog} --help)\n")


def exit_code(command: Callable[[], int | None], debug: bool = False, interrupted: str = "stopped") -> int:
    """Run `command`: its own code (None counts as 0), or 2 after one line on bad input and on what a machine can do to
    a command, or 130 after the line `interrupted` on Ctrl-C, or 141 where nobody reads what it prints.

    debug: show the traceback too. An error that nobody foresaw is raised.
    """
    _escape_unprintable()
    try:
        code = command() or 0
        sys.stdout.flush()  # a disk that is full, or a reader that left, shows here and not when Python ends
        return code
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return NO_READER
    except Exception as error:
        said = one_line(error)
        if said is None:
            raise
        if debug:
            traceback.print_exc()
        print(f"error: {said}", file=sys.stderr)
        return BAD_INPUT
    finally:
        _drop_what_cannot_be_written()


def _escape_unprintable() -> None:
    """Characters that a terminal's encoding lacks are printed as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # and no notebook's
            stream.reconfigure(errors="backslashreplace")


def _drop_what_cannot_be_written() -> None:
    """Python would try again when it ends, and complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def positive(text: str) -> int:
    """argparse type: a whole number from 1 on."""
    return whole(text, 1)


def new_tokens(text: str) -> int:
    """argparse type: the length of an answer."""
    number = positive(text)
    if number > MOST_NEW_TOKENS:
        raise argparse.ArgumentTypeError(f"{text!r} is too long an answer, the largest possible is {MOST_NEW_TOKENS}")
    return number


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


def argument_of(read: Callable[[str], T]) -> Callable[[str], T]:
    """argparse type: what `read` makes of the text; a RerouteError is the line that the command tells."""

    @wraps(read)
    def argument(text: str) -> T:
        try:
            return read(text)
        except RerouteError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return argument


@argument_of
def budget(text: str) -> int | Fraction:
    """argparse type: 192, 128, 64, or a share of the visual tokens."""
    return parsed_budget(text)
