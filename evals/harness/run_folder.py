"""A folder of answers: one process at a time, one set of settings, and files that are whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from evals.harness.identity import changes
from evals.harness.text_files import read_object
from reroute_jax.errors import RerouteError

SETTINGS_FILE = "settings.json"
SUMMARY_FILE = "summary.json"
LOCK_FILE = ".lock"
ANSWERS = "*.jsonl"
RUN_FILES = (ANSWERS, SETTINGS_FILE, SUMMARY_FILE)
ASIDE = "before-"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder, made where it is not there, for this process alone.

    The operating system lets go of the lock of a process that ends, however it ends. Raises RerouteError at once while
    another process has it.
    """
    if folder.exists() and not folder.is_dir():
        raise RerouteError(f"{folder} is a file: give a folder as --out")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RerouteError(f"another process works on {folder}: wait for it, or give another --out") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def run_folder(
    folder: Path, settings: Mapping[str, Any], fresh: bool = False, owned: Sequence[str] = RUN_FILES
) -> Iterator[None]:
    """The folder locked, holding nothing or what was made with the same settings.

    fresh: what an earlier run left, the files called as `owned`, is moved to a folder in it first. Raises RerouteError
    naming what differs.
    """
    with locked(folder):
        if fresh:
            _move_aside(folder, owned)
        _settle(folder, json.loads(json.dumps(settings)))
        yield


def _settle(folder: Path, wanted: dict[str, Any]) -> None:
    file = folder / SETTINGS_FILE
    if not file.exists():
        if any(folder.glob(ANSWERS)):
            raise RerouteError(f"{folder} holds answers but no {SETTINGS_FILE}: give another --out, or --fresh")
        write_json(file, wanted)
        return
    try:
        found = read_object(file)
    except RerouteError as error:
        raise RerouteError(f"{error}: give another --out, or --fresh to start anew") from error
    differing = changes(found, wanted)
    if differing:
        raise RerouteError(
            f"{folder} was made with other settings ({'; '.join(differing)}): give another --out, or --fresh to start "
            "anew, which moves the old answers aside"
        )


def _move_aside(folder: Path, owned: Sequence[str]) -> None:
    old = sorted(file for pattern in owned for file in folder.glob(pattern))
    if not old:
        return
    number = 1
    while (aside := folder / f"{ASIDE}{number}").exists():
        number += 1
    aside.mkdir()
    for file in old:
        file.rename(aside / file.name)


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file as a whole or not at all."""
    part = file.with_name(file.name + ".part")
    with open(part, "w", encoding="utf-8") as out:
        json.dump(value, out, indent=2, allow_nan=False)
        out.write("\n")
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, file)
