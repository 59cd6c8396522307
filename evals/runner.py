"""Ask a model every question of a task, one JSON line each, so that a stopped run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from tqdm import tqdm

from evals.data import Doc
from reroute_jax.config import ModelConfig
from reroute_jax.errors import RerouteError
from reroute_jax.routing.plan import Schedule

Record = dict[str, Any]

SETTINGS_FILE = "settings.json"
SUMMARY_FILE = "summary.json"
_SAMPLE_BYTES = 1 << 16  # read at either end of a file for its fingerprint


class Answerer(Protocol):
    """What the evaluation needs of a model; `reroute_jax.load` gives one."""

    config: ModelConfig
    dtype: str
    image_processor: Any

    def plan(self, method: str, **arguments: Any) -> Schedule: ...

    def prompt_ids(self, text: str, grids: Sequence[tuple[int, int]]) -> Sequence[int]: ...

    def visual_grid(self, image: Image.Image) -> tuple[int, int]: ...

    def model_size(self, image: Image.Image) -> tuple[int, int]: ...

    def generate(
        self, pairs: Sequence[tuple[Image.Image, str]], *, schedule: Schedule, max_new_tokens: int, batch_size: int
    ) -> list[str]: ...


@dataclass(frozen=True)
class Task:
    """A benchmark. All members are pure, so that a run can be repeated and resumed.

    docs: its questions from doc_id `start` on; `total` of them from 0.
    score: (answer, question) -> fields of the JSON line; "metrics" among them maps a name to a number.
    """

    name: str
    docs: Callable[[int], Iterator[Doc]]
    total: int
    prompt: Callable[[Doc], str]
    score: Callable[[str, Doc], Record]
    max_new_tokens: int


@dataclass(frozen=True)
class Run:
    """One way of running the model over the questions. name: of its file."""

    name: str
    schedule: Schedule


def open_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the run folder, or check that the one there was made with the same settings.

    Raises RerouteError naming what differs.
    """
    file = folder / SETTINGS_FILE
    wanted = json.loads(json.dumps(settings))
    if not file.exists():
        if any(folder.glob("*.jsonl")):
            raise RerouteError(f"{folder} holds answers but no {SETTINGS_FILE}: give another --out")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, wanted)
        return
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise RerouteError(f"{file} is not JSON ({error}): give another --out, or delete {folder}") from error
    differing = [key for key in sorted(wanted.keys() | found.keys()) if wanted.get(key) != found.get(key)]
    if differing:
        what = "; ".join(f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} now" for key in differing)
        raise RerouteError(f"{folder} was made with other settings ({what}): give another --out, or delete it")


def answer(model: Answerer, task: Task, run: Run, folder: Path, batch_size: int) -> list[Record]:
    """Answer what is still unanswered in `folder`/NAME.jsonl, and return all its records in order.

    Lines are written batch by batch and synced, so that a kill loses one batch at most. A partly written batch is
    answered again as a whole: the batches, and with them the answers, are those of a run that was never stopped.
    """
    file = folder / f"{run.name}.jsonl"
    done = _recover(file, batch_size, task.total)
    docs = task.docs(done)
    with (
        open(file, "ab") as lines,
        tqdm(total=task.total, initial=done, desc=run.name, unit="question", smoothing=0.1) as bar,
    ):
        while batch := list(islice(docs, batch_size)):
            records = _answer_batch(model, task, run, batch, batch_size)
            lines.write(b"".join(_line(record) for record in records))
            lines.flush()
            os.fsync(lines.fileno())
            bar.update(len(batch))
    records = _read(file)
    if len(records) != task.total:
        raise RerouteError(f"{file} has {len(records)} answers for {task.total} questions: delete it and run again")
    return records


def _answer_batch(model: Answerer, task: Task, run: Run, batch: Sequence[Doc], batch_size: int) -> list[Record]:
    prompts = [task.prompt(doc) for doc in batch]
    pairs = [(doc.image, prompt) for doc, prompt in zip(batch, prompts, strict=True)]
    texts = model.generate(pairs, schedule=run.schedule, max_new_tokens=task.max_new_tokens, batch_size=batch_size)
    grids = [model.visual_grid(doc.image) for doc in batch]
    return [
        {
            "task": task.name,
            "doc_id": doc.doc_id,
            "question_id": doc.question_id,
            "prompt": prompt,
            "text": text,
            "image_size": list(doc.size),
            "model_size": list(model.model_size(doc.image)),
            "visual_grid": [rows, cols],
            "text_tokens": len(model.prompt_ids(prompt, [(rows, cols)])) - rows * cols,
            **task.score(text.strip(), doc),
        }
        for doc, prompt, text, (rows, cols) in zip(batch, prompts, texts, grids, strict=True)
    ]


def _recover(file: Path, batch_size: int, total: int) -> int:
    """Cut `file` after its last whole batch, and return how many questions it answers."""
    if not file.exists():
        return 0
    whole = file.read_bytes().split(b"\n")[:-1]
    done = len(whole) if len(whole) == total else len(whole) // batch_size * batch_size
    with open(file, "r+b") as lines:
        lines.truncate(sum(len(line) + 1 for line in whole[:done]))
        os.fsync(lines.fileno())
    _read(file)
    return done


def _read(file: Path) -> list[Record]:
    records = []
    for index, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
        try:
            records.append(json.loads(line))
            right = records[-1]["doc_id"] == index
        except (ValueError, KeyError, TypeError):
            right = False
        if not right:
            raise RerouteError(f"line {index + 1} of {file} is no answer to question {index}: delete it and run again")
    return records


def _line(record: Record) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file as a whole or not at all."""
    part = file.with_name(file.name + ".part")
    with open(part, "w", encoding="utf-8") as out:
        json.dump(value, out, indent=2, allow_nan=False)
        out.write("\n")
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, file)


def fingerprint(path: Path) -> str:
    """16 hex digits that change when a file in `path` (a file or folder) is replaced, without reading all of 14 GB.

    Covers names, sizes and both ends of every file; a middle that alone changes goes unseen.
    """
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)}:{size}:".encode())
        with open(file, "rb") as content:
            digest.update(content.read(_SAMPLE_BYTES))
            content.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(content.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
