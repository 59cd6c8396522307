"""Frozen dataclasses as JSON and back, with exact fractions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from fractions import Fraction
from typing import Any, TypeVar

Made = TypeVar("Made")


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
    """The dataclass that `plain` wrote. Raises TypeError for surplus or missing fields."""
    return kind(**{name: _exact(value) for name, value in record.items() if name != "kind"})


def _exact(value: Any) -> Any:
    return Fraction(value) if isinstance(value, str) and re.fullmatch(r"\d+/\d+", value) else value
