"""A mapping in bounded memory, which the least recently used leave."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any


class Recent:
    """Values of up to `max_bytes` together; one that is larger is not kept. nbytes_of: of a value. For one thread at a
    time."""

    def __init__(self, max_bytes: int, nbytes_of: Callable[[Any], int]) -> None:
        self._max_bytes, self._nbytes_of, self.nbytes = max_bytes, nbytes_of, 0
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> Any | None:
        """The value of this name, if it is kept; it counts as used."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def keep(self, key: Hashable, value: Any) -> None:
        """A value that was used last; one of its name stays as it is."""
        if self.get(key) is not None:
            return
        self._kept[key] = value
        self.nbytes += self._nbytes_of(value)
        while self.nbytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.nbytes -= self._nbytes_of(oldest)
