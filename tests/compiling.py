"""What XLA compiles, by JAX's own log: a program that was traced before may be compiled again."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def xla_programs() -> Iterator[list[str]]:
    """The names of the programs that are compiled inside, once for each time."""
    found: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        if name := re.match(r"Finished XLA compilation of jit\((\w+)\)", record.getMessage()):
            found.append(name[1])
        return False

    log = logging.getLogger("jax._src.dispatch")
    log.addFilter(note)
    try:
        with jax.log_compiles():
            yield found
    finally:
        log.removeFilter(note)
