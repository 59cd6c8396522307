"""Questions as one `Doc` each, read as they are needed from the embedded scenes or from a table of `columns`.

Preprocessing follows lmms-eval v0.7.1. Grounding: a document per expression, float32 truth, JPEG images re-saved twice.
"""

from __future__ import annotations

import io
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from evals.harness.boxes import Box
from evals.harness.columns import ColumnKind, DataRow, DataSet, Hub, a_list, is_number, is_text, open_table
from reroute_jax.engine.images import decode_image
from reroute_jax.errors import RerouteError, named

SCENES = "scenes"
REC_COLUMNS = ("question_id", "image", "answer", "bbox")
REC_KINDS = {
    "answer": ColumnKind("a list of strings", a_list(is_text)),
    "bbox": ColumnKind("a list of 4 numbers", a_list(is_number)),
}
REFCOCO = Hub("lmms-lab/RefCOCO", None, "val")
PARITY_JPEG_ROUNDTRIPS = 2
IMAGE_BACKEND = "pil"  # what decodes and resizes; pixels differ a little between libraries


class BadImage(RerouteError):
    """A row's image that is missing, cannot be decoded or has a form that the model does not take."""


@dataclass(frozen=True)
class Doc:
    """One question. image: RGB, as the model gets it. size: (width, height) in pixels. truth: what the score needs.

    cluster: label shared by questions whose answers depend on each other; empty: the question_id. bad: what is wrong
    with the image of a question that is not to be asked; then image, size and truth are not there. shrinking: (width,
    height) of what a run's tower sees of the image, as shares: boxes in pixels are in pixels of that (16.4).
    """

    doc_id: int
    question_id: str
    image: Image.Image | None
    size: tuple[int, int] | None
    text: str
    truth: Any
    cluster: str = ""
    bad: str = ""
    shrinking: tuple[Fraction, Fraction] = (Fraction(1), Fraction(1))


@dataclass(frozen=True)
class DocSource:
    """A split whose rows can be read from the start any number of times.

    count: questions in it, None where there is no end. name: for messages and settings. files: local ones it is read
    from. images: a number of questions -> the image files that the first so many name, None for one stored with its
    row. revision: of a set on the hub.
    """

    name: str
    rows: Callable[[], Iterator[DataRow]]
    count: int | None
    files: tuple[Path, ...] = ()
    images: Callable[[int], Iterable[Path | None]] = lambda questions: ()
    revision: str | None = None


def rec_source(data: str, split: str | None, family: str = "llava", hub: Hub = REFCOCO) -> DocSource:
    """The split of a data set with RefCOCO's columns: `scenes`, or what `tables.open_table` takes.

    split None: test for the scenes, `hub`'s otherwise. family: of the model, for which the scenes are drawn. Raises
    RerouteError naming what is missing.
    """
    if data == SCENES:
        return _scenes(split or "test", family)
    table = open_table(data, split, hub, REC_COLUMNS, REC_KINDS)
    ends = list(accumulate(_checked_questions(table)))  # by row, how many questions it and all before it hold
    if not ends or ends[-1] == 0:
        raise RerouteError(f"{table.name} holds no referring expression, expected at least one in its column answer")

    def images(questions: int) -> Iterable[Path | None]:
        return islice(table.images(), bisect_left(ends, questions) + 1)

    return DocSource(table.name, lambda: table.rows(REC_COLUMNS), ends[-1], table.files, images, table.revision)


def _checked_questions(table: DataSet) -> Iterator[int]:
    """How many expressions each row holds. Raises RerouteError for a row that nothing can be asked or scored of."""
    for number, row in enumerate(table.rows(("question_id", "answer", "bbox"))):
        expressions = _expressions(row["answer"], f"{table.name}, row {number}")
        if expressions:
            question_id = identifier("question_id", row["question_id"], f"{table.name}, row {number}")
            _float32_box(row["bbox"], f"{table.name}, row {number}, question_id {question_id}")
        yield len(expressions)


def rec_docs(source: DocSource, start: int, stop: int, jpeg_roundtrips: int, skip_bad: bool = False) -> Iterator[Doc]:
    """One document per expression, in order, those with start <= doc_id < stop.

    Each truth is (x1, y1, x2, y2) in fractions of the image, rounded to float32 and widened. skip_bad: give documents
    with `bad` set where an image cannot be decoded, instead of raising BadImage.
    """
    doc_id = 0
    for row in source.rows():
        question_id = str(row["question_id"])
        where = f"{source.name}, question_id {question_id}"
        expressions = _expressions(row["answer"], where)
        wanted = range(max(start, doc_id), min(stop, doc_id + len(expressions)))
        if wanted:
            image, bad = _image_or_reason(row["image"], where, skip_bad, jpeg_roundtrips)
            if image is not None:
                with bad_row_named(where):
                    truth = _truth(row["bbox"], image.size, where)
        for index in wanted:
            text = expressions[index - doc_id]
            if image is None:
                yield Doc(index, question_id, None, None, text, None, bad=bad)
            else:
                yield Doc(index, question_id, image, image.size, text, truth)
        doc_id += len(expressions)
        if doc_id >= stop:
            return


def row_docs(
    source: DocSource,
    start: int,
    stop: int,
    columns: Mapping[str, type],
    prompt: Callable[[DataRow], str],
    key: str | None,
    cluster: Callable[[DataRow], str] | None = None,
    skip_bad: bool = False,
) -> Iterator[Doc]:
    """One document per row, in order, those with start <= doc_id < stop. Its truth is the row without the image.

    columns: what the values have to be. key: column of the question_id, None for the row's number. cluster, skip_bad:
    as in Doc and rec_docs. Raises RerouteError naming a row that cannot be asked.
    """
    for doc_id, row in enumerate(islice(source.rows(), start, stop), start):
        question_id = str(doc_id) if key is None else identifier(key, row[key], f"{source.name}, row {doc_id}")
        where = f"{source.name}, {key or 'row'} {question_id}"
        for name, kind in columns.items():
            if not isinstance(row[name], kind) or (kind is int and isinstance(row[name], bool)):
                raise RerouteError(f"{where}: {name} is {row[name]!r}, expected {kind.__name__}")
        truth = {name: value for name, value in row.items() if name != "image"}
        with bad_row_named(where), named(where):
            text, label = prompt(row), "" if cluster is None else cluster(row)
        image, bad = _image_or_reason(row["image"], where, skip_bad, jpeg_roundtrips=0)
        if image is None:
            yield Doc(doc_id, question_id, None, None, text, None, cluster=label, bad=bad)
        else:
            yield Doc(doc_id, question_id, image, image.size, text, truth, cluster=label)


def identifier(name: str, value: Any, where: str = "") -> str:
    """What tells questions, or what they are about, apart. Raises RerouteError for what is missing: all rows without
    one would count as one in the intervals."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value or value == "":
        raise RerouteError(f"{where}{where and ': '}{name} is {value!r}, expected a text or a number of its own")
    return str(value)


@contextmanager
def bad_row_named(where: str) -> Iterator[None]:
    """Turns the errors that a row's contents of a wrong type cause into one RerouteError."""
    try:
        yield
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        if isinstance(error, RerouteError):
            raise
        raise RerouteError(f"{where}: the row has contents of a wrong type ({error})") from error


def _expressions(answer: Any, where: str) -> list[str]:
    """A row's expressions; none where there is no list of them."""
    expressions = [] if answer is None else answer
    if not isinstance(expressions, list) or not all(isinstance(one, str) for one in expressions):
        raise RerouteError(f"{where}: answer is {answer!r}, expected a list of strings")
    return expressions


def _truth(bbox: Any, size: tuple[int, int], where: str) -> Box:
    (x, y, w, h), (width, height) = _float32_box(bbox, where), size
    corners = (x / width, y / height, (x + w) / width, (y + h) / height)
    x1, y1, x2, y2 = rounded = tuple(float(np.float32(value)) for value in corners)
    if not (x1 < x2 and y1 < y2 and all(map(math.isfinite, rounded))):
        raise RerouteError(f"{where}: bbox is {bbox}, which is no area of an image of {width} x {height} in float32")
    return rounded


def _float32_box(bbox: Any, where: str) -> tuple[float, ...]:
    """x, y, width, height as the float32 column of the reference holds them."""
    numbers = isinstance(bbox, Sequence) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in bbox
    )
    try:
        with np.errstate(over="ignore"):
            box = tuple(float(np.float32(value)) for value in bbox) if numbers else ()
    except OverflowError:  # a whole number that no float holds
        box = ()
    if len(box) != 4 or not all(map(math.isfinite, box)):
        raise RerouteError(f"{where}: bbox is {bbox}, expected 4 finite numbers x, y, width, height")
    if box[2] <= 0 or box[3] <= 0:
        raise RerouteError(f"{where}: bbox is {bbox}, expected a width and a height above 0")
    return box


def _image_or_reason(stored: Any, where: str, skip_bad: bool, jpeg_roundtrips: int) -> tuple[Image.Image | None, str]:
    try:
        return _as_lmms_eval(stored, where, jpeg_roundtrips), ""
    except BadImage as error:
        if not skip_bad:
            raise
        return None, str(error)


def _as_lmms_eval(stored: Any, where: str, jpeg_roundtrips: int) -> Image.Image:
    """RGB as lmms-eval's tasks hand it over, after as many re-saves of a JPEG (Pillow's defaults: quality 75, 4:2:0).

    Its rule for modes is Pillow's plain `convert("RGB")`, not `images.on_white` of the library: transparency is dropped
    and 16-bit grey is cut off at 255. An image that had to be turned has no format and so no re-saves, in `datasets`.
    """
    try:
        image = decode_image(stored, where)
        for _ in range(jpeg_roundtrips if image.format == "JPEG" else 0):
            buffer = io.BytesIO()
            image.save(buffer, format="JPEG")
            image = Image.open(buffer)
            image.load()
        rgb = image.convert("RGB")
    except RerouteError as error:
        raise BadImage(f"{error}; repair it or give --skip-bad") from error
    except (OSError, TypeError, ValueError) as error:
        raise BadImage(f"{where}: the image cannot be used ({error}), repair it or give --skip-bad") from error
    rgb.info = {}  # or the model would lay a transparent colour, which is dropped here, on white
    return rgb


def _scenes(split: str, family: str) -> DocSource:
    from evals.scenes.data import refcoco_rows
    from evals.scenes.world import SPLIT_LENGTH

    next(refcoco_rows(split, 1, family=family))  # an unknown split is refused here, before a model is loaded
    return DocSource(f"{SCENES} [{split}]", lambda: refcoco_rows(split, SPLIT_LENGTH, family=family), None)
