"""What the folder of a finished benchmark, or of a task in a table, says: settings, summary and every answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.harness.routes import FULL
from evals.harness.run_folder import ASIDE, SUMMARY_FILE
from evals.harness.runner import Record
from evals.harness.text_files import json_object, read_object
from reroute_jax.errors import RerouteError


@dataclass(frozen=True)
class Finished:
    """records: by run, in the order of the questions; the run with all tokens first."""

    folder: Path
    summary: Mapping[str, Any]
    records: Mapping[str, Sequence[Record]]

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.summary["settings"]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Runs to hold against each other, such as a reroute and its deletion."""
        told = [tuple(name.split(" minus ")) for name in self.summary["differences"]]
        return told or [(run, FULL) for run in self.records if run != FULL]


def read_finished(folder: Path) -> Finished:
    """Raises RerouteError where the folder has no summary, several of them, or answers are missing."""
    if not (folder / SUMMARY_FILE).is_file():
        found = (file.parent for file in folder.rglob(SUMMARY_FILE))
        within = sorted(str(place) for place in found if not place.name.startswith(ASIDE))
        hint = f"it holds several, give one of {', '.join(within)}" if within else "let the command that made it finish"
        raise RerouteError(f"{folder} is no folder of one finished run: {hint}")
    summary = read_object(folder / SUMMARY_FILE)
    return Finished(folder, summary, {run: _records(folder, run) for run in summary["runs"]})


def _records(folder: Path, run: str) -> list[Record]:
    """Of RUN.jsonl, or of RUN/RUN.jsonl in a table."""
    places = folder / f"{run}.jsonl", folder / run / f"{run}.jsonl"
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise RerouteError(f"{folder} lacks the answers of {run}: repeat the command that made it")
    lines = file.read_bytes().splitlines()
    return [json_object(line, f"line {number} of {file}") for number, line in enumerate(lines, 1)]
