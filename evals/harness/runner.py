"""Ask a model every question of a task, one JSON line each, so that a stopped run goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from PIL import Image
from tqdm import tqdm

from evals.harness.data import IMAGE_BACKEND, BadImage, Doc
from evals.harness.metrics import Derived
from evals.harness.text_files import json_object
from reroute_jax.buckets import TEXT_BUCKETS, bucket
from reroute_jax.config import ModelConfig
from reroute_jax.engine.answers import Answer
from reroute_jax.engine.pipeline import ahead
from reroute_jax.errors import RerouteError
from reroute_jax.routing.downsample import Downsample
from reroute_jax.routing.plan import Schedule

Record = dict[str, Any]

BAD_IMAGE, BAD_QUESTION, INCOMPLETE = "bad image", "bad question", "incomplete"  # why a question counts for nothing
WINDOW = 4  # batches whose questions are sorted by size
LOOKAHEAD = WINDOW  # batches made ready while one is answered: a window's images are decoded in one go


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

    def question(self, item: tuple[Image.Image, str]) -> Any: ...

    def answer(
        self, items: Sequence[Any], *, schedule: Schedule, max_new_tokens: int, batch_size: int
    ) -> list[Answer]: ...


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
    skip_bad: whether a question that the model cannot be asked, for its image or its text, is counted instead of
        stopping.
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
    skip_bad: bool = False
    difference_scale: int = 100


@dataclass(frozen=True)
class Ready:
    """A batch that can be asked at once. asked: what `Answerer.question` made of its `docs`, without the bad ones.

    records: the JSON lines of `docs` as far as they are known before the answers.
    """

    docs: list[Doc]
    records: list[Record]
    asked: list[Any]

    @property
    def last(self) -> int:
        """The highest number of its questions."""
        return max(doc.doc_id for doc in self.docs)


@dataclass(frozen=True)
class Run:
    """One way of running the model over the questions. name: of its file."""

    name: str
    schedule: Schedule


def answer(model: Answerer, task: Task, places: Sequence[tuple[Run, Path]], batch_size: int) -> dict[str, list[Record]]:
    """Answer what is still unanswered in FOLDER/NAME.jsonl of each run and its folder, and return the records of every
    run in order.

    Questions are prepared once for all runs. Lines are in the order of the questions, and synced after each batch as
    far as the order allows. After a kill, what is lost are the batches of one window at most. A batch that is not in a
    file as a whole is answered again as a whole: the batches, and with them the answers, are those of a run that was
    never stopped.
    """
    files = {run.name: folder / f"{run.name}.jsonl" for run, folder in places}
    done = {name: _lines_done(file) for name, file in files.items()}
    ready = ahead(_unanswered(model, task, min(done.values()), batch_size), LOOKAHEAD)
    bar = tqdm(total=task.total * len(files), initial=sum(done.values()), unit="question", smoothing=0.1)
    with ExitStack() as opened:
        opened.enter_context(bar)
        opened.enter_context(closing(ready))
        lines = {name: _Lines(opened.enter_context(open(file, "ab")), done[name]) for name, file in files.items()}
        for batch in ready:
            for run, _ in places:
                if batch.last >= done[run.name]:
                    bar.set_description(run.name)
                    bar.update(lines[run.name].write(answered(model, task, run, batch, batch_size)))
    return {name: _complete(file, task) for name, file in files.items()}


@dataclass
class _Lines:
    """A run's file. done: lines in it. Records wait for those before them."""

    file: BinaryIO
    done: int
    waiting: dict[int, Record] = field(default_factory=dict)

    def write(self, records: Sequence[Record]) -> int:
        """How many lines the file now has more."""
        before = self.done
        self.waiting |= {record["doc_id"]: record for record in records if record["doc_id"] >= before}
        while self.done in self.waiting:
            self.file.write(_line(self.waiting.pop(self.done)))
            self.done += 1
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.done - before


def _unanswered(model: Answerer, task: Task, done: int, batch_size: int) -> Iterator[Ready]:
    """The batches with questions from number `done` on."""
    return prepared_batches(model, task, range(done, task.total), batch_size)


def prepared_batches(model: Answerer, task: Task, wanted: Sequence[int], batch_size: int) -> Iterator[Ready]:
    """The batches of a single process that hold some of the `wanted` questions, ascending."""
    if not wanted:
        return
    window, sought = WINDOW * batch_size, set(wanted)
    first, end = wanted[0] // window * window, -(-(wanted[-1] + 1) // window) * window
    docs = (_taken(model, task, doc) for doc in islice(task.docs(first), end - first))
    for batch in sized_batches(docs, batch_size, partial(_visual_tokens, model)):
        if any(doc.doc_id in sought for doc in batch):
            yield _ready(model, task, batch)


def _visual_tokens(model: Answerer, doc: Doc) -> int:
    if doc.image is None:
        return 0
    rows, cols = model.visual_grid(doc.image)
    return rows * cols


def _complete(file: Path, task: Task) -> list[Record]:
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


def _taken(model: Answerer, task: Task, doc: Doc) -> Doc:
    """The question, as one with a bad image where the model takes none of its form."""
    if doc.image is None:
        return doc
    try:
        model.visual_grid(doc.image)
    except RerouteError as error:
        return _refused(task, doc, error)
    return doc


def _refused(task: Task, doc: Doc, error: RerouteError) -> Doc:
    """A question that cannot be asked, as a bad one. Raises BadImage naming it where these are not to be skipped."""
    why = f"{task.name}, question_id {doc.question_id}: {error}; repair it or give --skip-bad"
    if not task.skip_bad:
        raise BadImage(why) from error
    return replace(doc, image=None, size=None, truth=None, bad=why)


def _lines_done(file: Path) -> int:
    """How many there are, once a line that a kill cut off is gone from the file."""
    cut_off(file)
    return len(_read(file)) if file.exists() else 0


def cut_off(file: Path) -> None:
    """Cut a line that a kill cut off, so that the next one stands by itself."""
    whole = sum(map(len, whole_lines(file)))
    if file.exists() and file.stat().st_size > whole:
        with open(file, "r+b") as cut:
            cut.truncate(whole)
            os.fsync(cut.fileno())


def _ready(model: Answerer, task: Task, docs: list[Doc]) -> Ready:
    rows = [_prepared(model, task, doc) for doc in docs]
    asked = [question for doc, _, question in rows if not doc.bad]
    return Ready([doc for doc, _, _ in rows], [record for _, record, _ in rows], asked)


def _prepared(model: Answerer, task: Task, doc: Doc) -> tuple[Doc, Record, Any]:
    """The question with its record so far and what `Answerer.question` made of it, None where it cannot be asked."""
    reason = BAD_IMAGE
    if not doc.bad:
        try:
            record = _record(model, task, doc)
            return doc, record, model.question((doc.image, record["prompt"]))
        except RerouteError as error:
            doc, reason = _refused(task, doc, error), BAD_QUESTION
    return doc, _identity(task, doc) | {"left_out": reason, "why": doc.bad, "metrics": {}}, None


def _identity(task: Task, doc: Doc) -> Record:
    return {
        "task": task.name,
        "doc_id": doc.doc_id,
        "question_id": doc.question_id,
        "cluster": doc.cluster or doc.question_id,
    }


def _record(model: Answerer, task: Task, doc: Doc) -> Record:
    prompt, (rows, cols) = task.prompt(doc), model.visual_grid(doc.image)
    text_tokens = len(model.prompt_ids(prompt, [(rows, cols)])) - rows * cols
    bucket(text_tokens, TEXT_BUCKETS, f"question {doc.question_id} (document {doc.doc_id}), in text tokens,")
    return _identity(task, doc) | {
        "image_backend": IMAGE_BACKEND,
        "image_size": list(doc.size),
        "model_size": list(model.model_size(doc.image)),
        "visual_grid": [rows, cols],
        "text_tokens": text_tokens,
        "prompt": prompt,
    }


def answered(model: Answerer, task: Task, run: Run, batch: Ready, batch_size: int) -> list[Record]:
    """The records of a batch with the answers and what they score."""
    how = {"schedule": run.schedule, "max_new_tokens": task.max_new_tokens, "batch_size": batch_size}
    answers = iter(model.answer(batch.asked, **how) if batch.asked else [])
    return [
        record if doc.bad else _scored(task, run, doc, record | {"schedule": run.schedule.label}, next(answers))
        for doc, record in zip(batch.docs, batch.records, strict=True)
    ]


def _scored(task: Task, run: Run, doc: Doc, record: Record, answer: Answer) -> Record:
    doc = as_seen(doc, run.schedule, record["visual_grid"])
    return record | {"text": answer.text, "finish": answer.finish_reason, **task.score(answer.text.strip(), doc)}


def as_seen(doc: Doc, schedule: Schedule, grid: Sequence[int]) -> Doc:
    """The question with what the schedule's tower sees of its image, of (rows, cols) visual tokens."""
    if not isinstance(schedule.merge, Downsample):
        return doc
    return replace(doc, shrinking=schedule.merge.shrinking(tuple(grid)))


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


def append(file: Path, records: Sequence[Record]) -> None:
    """Lines behind those that are there, on the disk when this returns."""
    with open(file, "ab") as out:
        out.write(b"".join(map(_line, records)))
        out.flush()
        os.fsync(out.fileno())


def whole_lines(file: Path, start: int = 0) -> list[bytes]:
    """From a byte of the file on; one that a kill cut off is not there. Nothing without the file."""
    if not file.exists():
        return []
    with open(file, "rb") as opened:
        opened.seek(start)
        return [line for line in opened.read().splitlines(keepends=True) if line.endswith(b"\n")]


def read_lines(file: Path, start: int = 0) -> tuple[list[Record], int]:
    """Of `whole_lines`, and where the next ones will begin."""
    lines = whole_lines(file, start)
    return [json_object(line, f"a line of {file}") for line in lines], start + sum(map(len, lines))


def write_lines(file: Path, records: Sequence[Record]) -> None:
    """As a whole or not at all."""
    part = file.with_name(file.name + ".part")
    part.unlink(missing_ok=True)
    append(part, records)
    part.replace(file)


def _line(record: Record) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"
