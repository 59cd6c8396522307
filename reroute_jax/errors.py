"""The one exception a user's mistake raises."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class RerouteError(ValueError):
    """Bad input. The message is one line: what was wrong, what was expected, what to do."""


def one_of(what: str, value: object, allowed: Sequence[str]) -> None:
    """Raises RerouteError naming every allowed value unless `value` is one of them."""
    if value not in allowed:
        raise RerouteError(f"{what} is {value!r}, expected one of: {', '.join(allowed)}")


@contextmanager
def named(where: str) -> Iterator[None]:
    """Errors inside say where they happened."""
    try:
        yield
    except RerouteError as error:
        raise RerouteError(f"{where}: {error}") from error
