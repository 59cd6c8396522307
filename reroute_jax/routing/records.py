"""Frozen dataclasses as JSON and back, with exact fractions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from fractions import Fraction
from numbers import Integral, Real
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from reroute_jax.errors import RerouteError

Made = TypeVar("Made")
_NUMBERS = {int: Integral, float: Real}


def plain(value: Any) -> Any:
    """What `json` can write. A dataclass inside another one tells its class as "kind"; a fraction is text."""
    if is_dataclass(value):
        inner = {field.name: getattr(value, field.name) for field in fields(value)}
        return {name: _told(item) for name, item in inner.items()}
    if isinstance(value, Fraction):
        return f"{value.numerator}/{value.denominator}"
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value


def _told(value: Any) -> Any:
    return {"kind": type(value).__name__, **plain(value)} if is_dataclass(value) else plain(value)


def made(kind: type[Made], record: Mapping[str, Any]) -> Made:
    """The dataclass that `plain` wrote. Raises TypeError for surplus or missing fields, and RerouteError for one of
    another type."""
    given = {name: _exact(value) for name, value in record.items() if name != "kind"}
    check_types(kind, given, f" of a {kind.__name__}")
    return kind(**given)


def check_types(kind: type, given: Mapping[str, Any], where: str = "") -> None:
    """Raises RerouteError naming a value that is not what the dataclass says of the field, numpy's numbers aside;
    fields that are tuples are not looked into. where: behind the name in the message."""
    for name, hint in get_type_hints(kind).items():
        if name in given and not _fits(given[name], hint):
            shown = hint.__name__ if isinstance(hint, type) else str(hint)
            raise RerouteError(f"{name}{where} is {given[name]!r}, expected {shown}")


def _fits(value: Any, hint: Any) -> bool:
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, tuple(_NUMBERS.get(kind) or get_origin(kind) or kind for kind in kinds))


def _exact(value: Any) -> Any:
    return Fraction(value) if isinstance(value, str) and re.fullmatch(r"\d+/[1-9]\d*", value) else value
