"""Questions from the embedded scenes, from local parquet or from the hub, one `Doc` each, read as they are needed.

Preprocessing follows lmms-eval v0.7.1: a document per expression, float32 truth, JPEG images re-saved twice.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from evals.boxes import Box
from reroute_jax.errors import RerouteError

Row = Mapping[str, Any]

SCENES = "scenes"
REC_COLUMNS = ("question_id", "image", "answer", "bbox")
PARITY_JPEG_ROUNDTRIPS = 2


@dataclass(frozen=True)
class Doc:
    """One question. image: RGB, as the model gets it. size: (width, height) in pixels. truth: what the score needs."""

    doc_id: int
    question_id: str
    image: Image.Image
    size: tuple[int, int]
    text: str
    truth: Any
    category: str = ""


@dataclass(frozen=True)
class Source:
    """A split whose rows can be read from the start any number of times.

    count: referring expressions in it, None where there is no end. name: for messages and settings.
    """

    name: str
    rows: Callable[[], Iterator[Row]]
    count: int | None


def rec_source(data: str, split: str | None, family: str = "llava") -> Source:
    """The split of a data set with RefCOCO's columns: `scenes`, a local parquet file or folder, or a hub id.

    split None: test for the scenes, val otherwise. family: of the model, for which the scenes are drawn. Raises
    RerouteError naming what is missing.
    """
    if data == SCENES:
        return _scenes(split or "test", family)
    path = Path(data).expanduser()
    if path.is_file():
        if split is not None:
            raise RerouteError(f"{path} is one file and so one split: leave --split out, or give the folder as --data")
        return _parquet([path], str(path))
    if path.is_dir():
        split = split or "val"
        return _parquet(_split_files(path, split), f"{path} [{split}]")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", data) and path.suffix != ".parquet":
        return _hub(data, split or "val")
    raise RerouteError(f"no file or folder {data} for --data, expected 'scenes', a hub id owner/name or local parquet")


def rec_docs(source: Source, start: int, stop: int, jpeg_roundtrips: int) -> Iterator[Doc]:
    """One document per expression, in order, those with start <= doc_id < stop.

    Each truth is (x1, y1, x2, y2) in fractions of the image, rounded to float32 and widened.
    """
    doc_id = 0
    for row in source.rows():
        expressions = row["answer"] or []
        wanted = range(max(start, doc_id), min(stop, doc_id + len(expressions)))
        if wanted:
            where = f"{source.name}, question_id {row['question_id']}"
            image = _prepare(_open(row["image"], where), jpeg_roundtrips)
            truth = _truth(row["bbox"], image.size, where)
        for index in wanted:
            yield Doc(index, str(row["question_id"]), image, image.size, str(expressions[index - doc_id]), truth)
        doc_id += len(expressions)
        if doc_id >= stop:
            return


def vqa_docs(rows: Iterable[Row], where: str, start: int = 0) -> Iterator[Doc]:
    """One document per row with the columns question_id, image, question, answer and, optionally, category.

    start: doc_id of the first row.
    """
    for doc_id, row in enumerate(rows, start):
        image = _open(row["image"], f"{where}, question_id {row['question_id']}").convert("RGB")
        category = str(row.get("category", ""))
        yield Doc(doc_id, str(row["question_id"]), image, image.size, row["question"], row["answer"], category)


def _truth(bbox: Iterable[float] | None, size: tuple[int, int], where: str) -> Box:
    box = [] if bbox is None else [float(np.float32(value)) for value in bbox]
    if len(box) != 4 or not all(map(math.isfinite, box)):
        raise RerouteError(f"{where}: bbox is {box}, expected 4 finite numbers x, y, width, height")
    (x, y, w, h), (width, height) = box, size
    corners = (x / width, y / height, (x + w) / width, (y + h) / height)
    return tuple(float(np.float32(value)) for value in corners)


def _open(stored: Any, where: str) -> Image.Image:
    """A row's image, decoded as `datasets` decodes it: {"bytes", "path"} as parquet stores it, or a PIL image."""
    if isinstance(stored, Image.Image):
        return stored
    encoded, path = (stored or {}).get("bytes"), (stored or {}).get("path")
    if encoded is None and path is None:
        raise RerouteError(f"{where}: there is no image, expected encoded bytes or the path of a file")
    try:
        image = Image.open(path if encoded is None else io.BytesIO(encoded))
        image.load()
    except FileNotFoundError as error:
        raise RerouteError(f"{where}: image file {path} does not exist") from error
    except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        raise RerouteError(f"{where}: the image cannot be decoded ({error}), repair or leave out the row") from error
    if image.getexif().get(ExifTags.Base.Orientation) is not None:
        # The turned copy has no format any more, so that `datasets` keeps it losslessly; so does _prepare.
        return ImageOps.exif_transpose(image)
    return image


def _prepare(image: Image.Image, jpeg_roundtrips: int) -> Image.Image:
    """RGB, after as many re-saves of a JPEG (Pillow's defaults: quality 75, 4:2:0) as the reference makes."""
    for _ in range(jpeg_roundtrips if image.format == "JPEG" else 0):
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG")
        image = Image.open(buffer)
        image.load()
    return image.convert("RGB")


def _scenes(split: str, family: str) -> Source:
    from evals.scenes.data import refcoco_rows

    endless = 10**9
    next(refcoco_rows(split, 1, family=family))  # an unknown split is refused here, before a model is loaded
    return Source(f"{SCENES} [{split}]", lambda: refcoco_rows(split, endless, family=family), None)


def _split_files(folder: Path, split: str) -> list[Path]:
    """Files of a split in the hub's layout: FOLDER[/data]/SPLIT-00000-of-00004.parquet, or SPLIT.parquet."""
    files = sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")])
    if not files:
        raise RerouteError(f"{folder} holds no parquet files, expected SPLIT-*.parquet in it or in its data folder")
    splits = {file: file.stem.split("-")[0] for file in files}
    if split not in splits.values():
        known = ", ".join(sorted(set(splits.values())))
        raise RerouteError(f"unknown split {split!r} of {folder}: expected one of {known}")
    return [file for file in files if splits[file] == split]


def _parquet(files: list[Path], name: str) -> Source:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    def rows() -> Iterator[Row]:
        for file in files:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=16, columns=list(REC_COLUMNS)):
                for row in batch.to_pylist():
                    yield _beside(row, file.parent)

    count = 0
    for file in files:
        try:
            schema = pq.read_schema(file)
        except (OSError, pa.ArrowInvalid) as error:
            raise RerouteError(f"{file} cannot be read as parquet ({str(error).splitlines()[0]})") from error
        _check_columns(schema, file)
        count += pc.sum(pc.list_value_length(pq.read_table(file, columns=["answer"])["answer"])).as_py() or 0
    return Source(name, rows, _some(count, name))


def _beside(row: dict[str, Any], folder: Path) -> Row:
    """The row, with the path of an image without bytes taken from the parquet file's folder."""
    image = row["image"]
    if image and image.get("bytes") is None and image.get("path") is not None:
        return row | {"image": {"bytes": None, "path": str(folder / image["path"])}}
    return row


def _check_columns(schema: Any, file: Path) -> None:
    import pyarrow.types as t

    _require_columns(schema.names, str(file))

    def a_list(kind: Any, of: Callable[[Any], bool]) -> bool:
        return (t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind)) and of(kind.value_type)

    kinds = {name: schema.field(name).type for name in REC_COLUMNS}
    wanted = {
        "image": ("a struct of bytes and path", t.is_struct(kinds["image"])),
        "answer": (
            "a list of strings",
            a_list(kinds["answer"], lambda kind: t.is_string(kind) or t.is_large_string(kind)),
        ),
        "bbox": (
            "a list of 4 numbers",
            a_list(kinds["bbox"], lambda kind: t.is_floating(kind) or t.is_integer(kind)),
        ),
    }
    for column, (expected, right) in wanted.items():
        if not right:
            raise RerouteError(f"column {column} of {file} is {kinds[column]}, expected {expected}")


def _hub(name: str, split: str) -> Source:
    try:
        import datasets
    except ImportError as error:
        raise RerouteError(f"--data {name} is a hub id and needs `datasets`: pip install 'reroute_jax[hub]'") from error
    try:
        splits = datasets.get_dataset_split_names(name)
        if split not in splits:
            raise RerouteError(f"unknown split {split!r} of {name}: expected one of {', '.join(splits)}")
        table = datasets.load_dataset(name, split=split)
    except RerouteError:
        raise
    except (OSError, ValueError) as error:
        raise RerouteError(f"data set {name} cannot be loaded ({str(error).splitlines()[0]})") from error
    _require_columns(table.column_names, name)
    encoded = table.select_columns(list(REC_COLUMNS)).cast_column("image", datasets.Image(decode=False))
    count = sum(len(answer) for answer in encoded["answer"])
    return Source(f"{name} [{split}]", lambda: iter(encoded), _some(count, f"{name} [{split}]"))


def _require_columns(names: Sequence[str], where: str) -> None:
    missing = [column for column in REC_COLUMNS if column not in names]
    if missing:
        raise RerouteError(f"{where} lacks the columns {', '.join(missing)}: it has {', '.join(names)}")


def _some(count: int, name: str) -> int:
    if count == 0:
        raise RerouteError(f"{name} holds no referring expression, expected at least one in its column answer")
    return count
