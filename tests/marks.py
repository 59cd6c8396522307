"""Cases that the plain run leaves out."""

from collections.abc import Iterable

import pytest


def cases(names: Iterable[str], slow: set[str]) -> list:
    """Names as parameters; those that are slow, more members of a kind that another one shows, have its mark."""
    unknown = slow - {*(names := list(names))}
    assert not unknown, unknown
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]
