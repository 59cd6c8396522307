"""Foreseeable failures of the machine and of other libraries, each as one line that says what to do."""

from __future__ import annotations

import errno
import os
from concurrent.futures.process import BrokenProcessPool

import jax

from reroute_jax.errors import RerouteError

# Packages that an extra of this project brings, by the name they are imported under.
EXTRAS = {
    "datasets": "hub",
    "matplotlib": "plot",
    "prometheus_client": "serve",
    "starlette": "serve",
    "torch": "torch",
    "uvicorn": "serve",
}
OUT_OF_MEMORY = "out of memory: give a smaller --batch-size, or a machine with more"


def one_line(error: BaseException) -> str | None:
    """What to tell the user of an error; None for one that nobody foresaw, whose traceback has to be seen."""
    match error:
        case RerouteError():
            return str(error)  # written for users; a report of all that is wrong has lines of its own
        case ModuleNotFoundError(name=str(name)):
            said = _absent_package(name)
        case BrokenProcessPool():
            said = "a worker process was killed, most likely for want of memory: run again on a machine with more"
        case MemoryError():
            said = OUT_OF_MEMORY
        case UnicodeEncodeError():
            said = f"{error}: the locale has no such character, set PYTHONUTF8=1"
        case OSError():
            said = _of_the_system(error)
        case RuntimeError() | AssertionError():
            said = _of_the_backend(error)
        case _:
            said = None
    return None if said is None else " ".join(said.split())


def _absent_package(name: str) -> str | None:
    package = name.split(".")[0]
    if package in EXTRAS:
        return f"{package} is not installed: pip install 'reroute_jax[{EXTRAS[package]}]'"
    if package in ("reroute_jax", "convert", "evals", "benchmarks"):
        return None
    return f"{package} is not installed: pip install {package}"


def _of_the_system(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error}: free some space, what was written before is whole"
    return str(error) or type(error).__name__


def _of_the_backend(error: RuntimeError | AssertionError) -> str | None:
    """A device that is not there fails in several ways, one an empty AssertionError (jax 0.10.2): so ask again."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as absent:
        reason = str(absent) or "it has no such backend"
        asked = os.environ.get("JAX_PLATFORMS", "")
        return f"JAX finds no device with JAX_PLATFORMS={asked!r} ({reason}): unset it, or install that device's jax"
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    said = str(error)
    exhausted = "RESOURCE_EXHAUSTED" in said or "out of memory" in said.lower()
    return f"{OUT_OF_MEMORY} ({_first_line(said)})" if exhausted else f"XLA failed: {_first_line(said)}"


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""
