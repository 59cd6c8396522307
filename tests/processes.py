"""Processes that tests start: as where PyTorch is not installed. Where it is, transformers imports it to read any
config.json, which takes half of the CPU seconds that a command needs to start."""

from __future__ import annotations

import sys


def python_without_torch(code: str, *arguments: str) -> list[str]:
    """The command that runs this code."""
    return [sys.executable, "-c", f"import sys; sys.modules['torch'] = None\n{code}", *arguments]


def module_without_torch(module: str, *arguments: str) -> list[str]:
    """The command that runs `python -m module`."""
    run = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return python_without_torch(run, *arguments)
