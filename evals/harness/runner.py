"""Ask a model every question of a task, one JSON line each, so that a stopped run goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from tqdm import tqdm

from evals.harness.data import IMAGE_BACKEND, Doc
from evals.harness.metrics import Derived
from evals.harness.text_files import json_object
from reroute_jax.buckets import TEXT_BUCKETS, bucket
from reroute_jax.config import ModelConfig
from reroute_jax.engine.pipeline import ahead
from reroute_jax.errors import RerouteError
from reroute_jax.routing.plan import Schedule

Record = dict[str, Any]

BAD_IMAGE, INCOMPLETE = "bad image", "incomplete"  # why a question counts for nothing
WINDOW = 4  # batches whose questions are sorted by size
LOOKAHEAD = WINDOW  # batches made ready while one is answered: a window's images are decoded in one go


class Answered(Protocol):
    """An answer with why it ended: finish_reason "stop", or "length" where the limit on new tokens cut it off."""

    text: str
    finish_reason: str


class Answerer(Protocol):
    """What the evaluation needs of a model; `reroute_jax.load` gives one."""

    config: ModelConfig
    dtype: str
    folder: Path
    image_processor: Any

    def plan(self, method: str, **arguments: Any) -> Schedule: ...

    def prompt_ids(self, text: str, grids: Sequence[tuple[int, int]]) -> Sequence[int]: ...

    def visual_grid(self, image: Image.Image) -> tuple[int, int]: ...

    def model_size(self, image: Image.Image) -> tuple[int, int]: ...

    def prepare(self, pairs: Sequence[tuple[Image.Image, str]], batch_size: int) -> Any: ...

    def answer(self, questions: Any, *, schedule: Schedule, max_new_tokens: int) -> list[str] | list[Answered]: ...


@dataclass(frozen=True)
class Task:
    """A benchmark. All members are pure, so that a run can be repeated and resumed.

    docs: its questions from doc_id `start` on; `total` of them from 0.
    score: (answer, question) -> fields of the JSON line; "metrics" among them maps a name to a number, "unparsed" says
        whether the task found nothing in the answer that it could read, and "noted", where it is there, what has to be
        known of the question. What is reported is the mean of such a number over the questions that have it, and what
        `derived` makes of these means: reported name -> function of the means by name, arrays with one number a
        resample. A name that starts with "_" exists for `derived` alone.
    finish: all records of a run in order -> the same with metrics that need several of them filled in. One with
        "left_out", a reason, and no metrics is counted under that reason.
    difference_scale: what tables multiply differences by, 100 for metrics that are fractions.
    """

    name: str
    docs: Callable[[int], Iterator[Doc]]
    total: int
    prompt: Callable[[Doc], str]
    score: Callable[[str, Doc], Record]
    max_new_tokens: int
    derived: Mapping[str, Derived] = field(default_factory=dict)
    finish: Callable[[Sequence[Record]], list[Record]] = list
    difference_scale: int = 100


@dataclass(frozen=True)
class Ready:
    """A batch that can be asked at once. asked: what `Answerer.prepare` made of its `docs`, None where all are bad.

    records: the JSON lines of `docs` as far as they are known before the answers.
    """

    docs: list[Doc]
    records: list[Record]
    asked: Any


@dataclass(frozen=True)
class Run:
    """One way of running the model over the questions. name: of its file."""

    name: str
    schedule: Schedule


def answer(model: Answerer, task: Task, run: Run, folder: Path, batch_size: int) -> list[Record]:
    """Answer what is still unanswered in `folder`/NAME.jsonl, and return all its records in order.

    Lines are in the order of the questions, and synced after each batch as far as the order allows. After a kill, what
    is lost are the batches of one window at most. A batch that is not in the file as a whole is answered again as a
    whole: the batches, and with them the answers, are those of a run that was never stopped.
    """
    file = folder / f"{run.name}.jsonl"
    done, batches = _resume(file, model, task, batch_size)
    ready = ahead((_ready(model, task, run, batch, batch_size) for batch in batches), LOOKAHEAD)
    waiting: dict[int, Record] = {}
    with (
        open(file, "ab") as lines,
        tqdm(total=task.total, initial=done, desc=run.name, unit="question", smoothing=0.1) as bar,
        closing(ready),
    ):
        for batch in ready:
            waiting |= {record["doc_id"]: record for record in _answered(model, task, run, batch)}
            while done in waiting:
                lines.write(_line(waiting.pop(done)))
                done += 1
            lines.flush()
            os.fsync(lines.fileno())
            bar.update(len(batch.docs))
    records = _read(file)
    if len(records) != task.total:
        raise RerouteError(f"{file} has {len(records)} answers for {task.total} questions: delete it and run again")
    return records


def sized_batches(docs: Iterator[Any], batch_size: int, size: Callable[[Any], int]) -> Iterator[list[Any]]:
    """The questions in batches of like size: sorted, in the order of their numbers where equal, window by window."""
    while window := list(islice(docs, WINDOW * batch_size)):
        window.sort(key=size)
        for start in range(0, len(window), batch_size):
            yield window[start : start + batch_size]


def _resume(file: Path, model: Answerer, task: Task, batch_size: int) -> tuple[int, Iterator[list[Doc]]]:
    """Cut `file` where batches and lines both end: how many questions it then answers, and the batches to be asked."""

    def size(doc: Doc) -> int:
        if doc.image is None:
            return 0
        rows, cols = model.visual_grid(doc.image)
        return rows * cols

    found = _whole_lines(file)
    done, batches = len(found), iter(())
    if done < task.total:
        window = WINDOW * batch_size
        done = done // window * window
        batches = sized_batches(task.docs(done), batch_size, size)
        begun = list(islice(batches, WINDOW)) if done < len(found) else []
        written = _written(begun, done, len(found))
        done += sum(map(len, begun[:written]))
        batches = chain(begun[written:], batches)
    if file.exists():
        with open(file, "r+b") as lines:
            lines.truncate(sum(map(len, found[:done])))
            os.fsync(lines.fileno())
        _read(file)
    return done, batches


def _written(batches: Sequence[Sequence[Doc]], start: int, stop: int) -> int:
    """How many of the first batches are together the questions from `start` on to one before `stop` or less."""
    count, numbers = 0, []
    for position, batch in enumerate(batches, 1):
        numbers += [doc.doc_id for doc in batch]
        if max(numbers) + 1 == start + len(numbers) <= stop:
            count = position
    return count


def _whole_lines(file: Path) -> list[bytes]:
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]


def _ready(model: Answerer, task: Task, run: Run, docs: list[Doc], batch_size: int) -> Ready:
    records = [_record(model, task, run, doc) for doc in docs]
    pairs = [(doc.image, record["prompt"]) for doc, record in zip(docs, records, strict=True) if not doc.bad]
    return Ready(docs, records, model.prepare(pairs, batch_size) if pairs else None)


def _record(model: Answerer, task: Task, run: Run, doc: Doc) -> Record:
    identity = {
        "task": task.name,
        "doc_id": doc.doc_id,
        "question_id": doc.question_id,
        "cluster": doc.cluster or doc.question_id,
    }
    if doc.bad:
        return identity | {"left_out": BAD_IMAGE, "why": doc.bad, "metrics": {}}
    prompt, (rows, cols) = task.prompt(doc), model.visual_grid(doc.image)
    text_tokens = len(model.prompt_ids(prompt, [(rows, cols)])) - rows * cols
    bucket(text_tokens, TEXT_BUCKETS, f"question {doc.question_id} (document {doc.doc_id}), in text tokens,")
    return identity | {
        "schedule": run.schedule.label,
        "image_backend": IMAGE_BACKEND,
        "image_size": list(doc.size),
        "model_size": list(model.model_size(doc.image)),
        "visual_grid": [rows, cols],
        "text_tokens": text_tokens,
        "prompt": prompt,
    }


def _answered(model: Answerer, task: Task, run: Run, batch: Ready) -> list[Record]:
    """The records of a batch with the answers and what they score."""
    limits = {"schedule": run.schedule, "max_new_tokens": task.max_new_tokens}
    answers = iter([] if batch.asked is None else model.answer(batch.asked, **limits))
    return [
        record if doc.bad else _scored(task, doc, record, next(answers))
        for doc, record in zip(batch.docs, batch.records, strict=True)
    ]


def text_and_finish(answered: str | Answered) -> tuple[str, str | None]:
    """Of an answer; how it ended is None where the model gives texts alone."""
    return (answered, None) if isinstance(answered, str) else (answered.text, answered.finish_reason)


def _scored(task: Task, doc: Doc, record: Record, answered: str | Answered) -> Record:
    text, finish = text_and_finish(answered)
    return record | {"text": text, "finish": finish, **task.score(text.strip(), doc)}


def _read(file: Path) -> list[Record]:
    records = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        where = f"line {number} of {file}"
        try:
            records.append(json_object(line, where))
        except RerouteError as error:
            raise RerouteError(f"{error}: delete it and run again") from error
        if records[-1].get("doc_id") != number - 1:
            raise RerouteError(f"{where} is no answer to question {number - 1}: delete it and run again")
    return records


def _line(record: Record) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"
