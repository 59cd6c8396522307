"""What devices of a mesh tell each other in a compiled program: its collectives, from XLA's text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_LINE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(?:-start)?\(.*?(?:op_name=\"([^\"]*)\")?[^\"]*$")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Collective:
    """kind: one of `KINDS`. shapes: of what it gives each device. place: scopes and operation that it is of."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    place: str

    @property
    def size(self) -> int:
        """Numbers that a device is given."""
        return sum(math.prod(shape) for shape in self.shapes)


def collectives(program: str) -> Iterator[Collective]:
    """Of the text of a compiled program (`compiled.as_text()`); one that runs while others do counts once."""
    for line in program.splitlines():
        if found := _LINE.search(line):
            result, kind, place = found.groups()
            shapes = tuple(tuple(map(int, filter(None, dims.split(",")))) for _, dims in _ARRAY.findall(result))
            yield Collective(kind, shapes, place or "")
