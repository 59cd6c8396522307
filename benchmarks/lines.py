"""Results as JSON lines that a benchmark goes on from: a line for each case and what came of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

Case, Found = TypeVar("Case"), TypeVar("Found")


def line(case: Case, found: Found) -> str:
    """Of two dataclasses without a field of the same name."""
    return json.dumps({**asdict(case), **asdict(found)}) + "\n"


def read(results: Path, case: type[Case], found: type[Found]) -> dict[Case, Found]:
    """What is there already, the last of equal cases; nothing without the file."""
    known = {}
    for text in results.read_text().splitlines() if results.exists() else ():
        row = json.loads(text)
        one, of = (kind(**{name: row[name] for name in kind.__dataclass_fields__}) for kind in (case, found))
        known[one] = of
    return known
