"""A run's questions shared by processes: each answers whole windows of its own, and one puts the lines together.

The batches are those of a single process, and so are the answers. A part's lines are of whole batches, in any order,
and synced after each: after a kill, what is lost is the batch that was in the making.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from evals.harness.processes import Processes
from evals.harness.runner import (
    LOOKAHEAD,
    WINDOW,
    Answerer,
    Run,
    Task,
    answered,
    append,
    cut_off,
    prepared_batches,
    read_lines,
    write_lines,
)
from reroute_jax.engine.pipeline import ahead
from reroute_jax.errors import RerouteError

_LOOK_SECONDS = 0.2  # between two looks at whether the others are done


def answer_together(
    model: Answerer,
    task: Task,
    runs: Sequence[Run],
    settings: Mapping[str, Any],
    batch_size: int,
    processes: Processes,
) -> bool:
    """Answer this process's share of the questions; process 0 waits for all and writes FOLDER/NAME.jsonl of each run.
    Whether it did.

    settings: that the answers depend on, whose parts alone are gone on with. Raises RerouteError where another process
    ended before its share was answered.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    parts = Parts(processes, task.total, batch_size, [run.name for run in runs], processes.folder / f"parts-{digest}")
    for run in runs:
        cut_off(parts.file(run.name))
    own = parts.missing(parts.share(processes.index))
    bar = tqdm(total=len(own) * len(runs), desc=f"process {processes.index}", unit="question", smoothing=0.1)
    with bar, closing(ahead(prepared_batches(model, task, own, batch_size), LOOKAHEAD)) as ready:
        for batch in ready:
            for run in runs:
                append(parts.file(run.name), answered(model, task, run, batch, batch_size))
                bar.update(len(batch.docs))
            parts.check()
    if processes.index:
        return False
    while parts.missing(range(task.total)):
        parts.check()
        time.sleep(_LOOK_SECONDS)
    parts.merge()
    return True


class Parts:
    """The files of one run's processes. names: of the runs."""

    def __init__(self, processes: Processes, total: int, batch_size: int, names: Sequence[str], folder: Path) -> None:
        self.processes, self.total, self.names, self.folder = processes, total, names, folder
        self.window = WINDOW * batch_size
        self._read: dict[Path, _Answers] = {}
        folder.mkdir(exist_ok=True)

    def share(self, number: int) -> range:
        """Questions of a process: windows side by side, as many as the others have or one less."""
        windows = -(-self.total // self.window)
        first, end = (windows * edge // self.processes.count * self.window for edge in (number, number + 1))
        return range(first, min(end, self.total))

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.{self.processes.index}.jsonl"

    def missing(self, questions: range) -> list[int]:
        """Those that not every run has an answer to. Of a file only what is new is read."""
        done = set.intersection(*(self._done(name) for name in self.names))
        return [number for number in questions if number not in done]

    def check(self) -> None:
        """Raises RerouteError where a process ended before its share was answered."""
        for number in self.processes.others():
            # In this order: its last lines are there before its lock is free.
            if not self.processes.works(number) and self.missing(self.share(number)):
                raise RerouteError(
                    f"process {number} of {self.processes.count} ended before its questions were answered, its own "
                    "message says why: the same command goes on where all of them were"
                )

    def merge(self) -> None:
        """Each run's lines in the order of the questions, as a single process writes them."""
        for name in self.names:
            found = {record["doc_id"]: record for file in self._files(name) for record in read_lines(file)[0]}
            write_lines(self.processes.folder / f"{name}.jsonl", [found[number] for number in range(self.total)])
        shutil.rmtree(self.folder)

    def _files(self, name: str) -> list[Path]:
        """Of a run, of all processes and of earlier ones."""
        of_a_process = re.compile(rf"{re.escape(name)}\.\d+\.jsonl")  # a run may be called full.1
        parts = (file for file in self.folder.iterdir() if of_a_process.fullmatch(file.name))
        return [self.processes.folder / f"{name}.jsonl", *sorted(parts)]

    def _done(self, name: str) -> set[int]:
        return set().union(*(self._read.setdefault(file, _Answers(file)).numbers() for file in self._files(name)))


@dataclass
class _Answers:
    """Of a file that grows by whole lines: the questions that are answered up to byte `end`."""

    file: Path
    end: int = 0
    answered: set[int] = field(default_factory=set)

    def numbers(self) -> set[int]:
        records, self.end = read_lines(self.file, self.end)
        self.answered.update(record["doc_id"] for record in records)
        return self.answered
