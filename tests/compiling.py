"""What XLA compiles, by JAX's own log: a program that was traced before may be compiled again."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def xla_programs() -> Iterator[list[str]]:
    """The names of the programs that are compiled inside, once for each time."""
    found: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        if name := re.match(r"Finished XLA compilation of jit\((\w+)\)", record.getMessage()):
            found.append(name[1])
        return False

    log = logging.getLogger("jax._src.dispatch")
    level = log.level
    log.setLevel(logging.DEBUG)  # `jax.log_compiles` holds in its own thread alone
    log.addFilter(note)
    try:
        yield found
    finally:
        log.removeFilter(note)
        log.setLevel(level)
