"""Tables of questions with an image each: on the hub, in local parquet files or in JSON lines, read as needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evals.harness.split_files import JSON_SUFFIXES, SUFFIXES, split_files
from evals.harness.text_files import json_lines
from reroute_jax.errors import RerouteError

DataRow = Mapping[str, Any]

IMAGE = "image"
OWN_HUB = "hub"  # --data: the benchmark's own set on the hub
_BATCH = 16  # rows of parquet read at a time


@dataclass(frozen=True)
class ImageTable:
    """Where the images of a set are that are stored apart: question[on] == image[key]."""

    config: str
    split: str
    on: str
    key: str


@dataclass(frozen=True)
class Hub:
    """A data set on the hub. config: None where there is one only. split: the one that is read by default."""

    name: str
    config: str | None
    split: str
    images: ImageTable | None = None


@dataclass(frozen=True)
class DataSet:
    """rows: of the columns given, from the first one, any number of times. count: of rows. name: for messages.

    files: local ones that the rows are in. images: by row in order, the image files beside them that it names, None
    for a row with its image in it. revision: of a set on the hub.
    """

    name: str
    rows: Callable[[Sequence[str]], Iterator[DataRow]]
    count: int
    files: tuple[Path, ...] = ()
    images: Callable[[], Iterable[Path | None]] = tuple
    revision: str | None = None


@dataclass(frozen=True)
class ColumnKind:
    """What a column has to be: in words, and as a test of an arrow type."""

    expected: str
    right: Callable[[Any], bool]


def is_text(kind: Any) -> bool:
    import pyarrow.types as t

    return t.is_string(kind) or t.is_large_string(kind)


def is_number(kind: Any) -> bool:
    import pyarrow.types as t

    return t.is_floating(kind) or t.is_integer(kind)


def is_struct(kind: Any) -> bool:
    import pyarrow.types as t

    return t.is_struct(kind)


def a_list(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def right(kind: Any) -> bool:
        import pyarrow.types as t

        return (t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind)) and of(kind.value_type)

    return right


IMAGE_KIND = {IMAGE: ColumnKind("a struct of bytes and path", is_struct)}


def open_table(
    data: str, split: str | None, hub: Hub, columns: Sequence[str], kinds: Mapping[str, ColumnKind] | None = None
) -> DataSet:
    """The table of `data`: 'hub' or a hub id, a folder in the hub's layout, or a parquet or JSON lines file.

    JSON lines hold the same columns; their image is the path of a file, beside them unless absolute. hub: its config,
    default split and images are looked for in any hub id or folder. columns: that it must have. kinds: of parquet
    columns, an image's aside. Raises RerouteError naming what is missing.
    """
    path = Path(data).expanduser()
    kinds = IMAGE_KIND | dict(kinds or {})
    if data == OWN_HUB:
        data = hub.name
    elif path.is_file():
        if split is not None:
            raise RerouteError(f"{path} is one file and so one split: leave --split out, or give the folder as --data")
        return _files([path], str(path), _and_image(columns), kinds)
    elif path.is_dir():
        if hub.images is not None and not (path / hub.images.config).is_dir():
            hub = replace(hub, images=None)  # then the image column has to be there
        return _joined(lambda config, *what: _folder(path, config, kinds, *what), hub, split or hub.split, columns)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", data) and path.suffix not in SUFFIXES:
        return _joined(lambda config, *what: _hub(data, config, *what), hub, split or hub.split, columns)
    raise RerouteError(
        f"no file or folder {data} for --data, expected 'scenes', 'hub', a hub id owner/name, or local parquet or JSON "
        "lines"
    )


def _joined(
    read: Callable[[str | None, str, Sequence[str]], DataSet], hub: Hub, split: str, columns: Sequence[str]
) -> DataSet:
    """Questions with their images; `read` gives the table of a config and split that has these columns."""
    if hub.images is None:
        return read(hub.config, split, _and_image(columns))
    apart, columns = hub.images, [name for name in columns if name != IMAGE]
    questions = read(hub.config, split, columns)
    pictures = read(apart.config, apart.split, (apart.key, IMAGE))
    images = {row[apart.key]: row[IMAGE] for row in pictures.rows((apart.key, IMAGE))}

    def rows(wanted: Sequence[str]) -> Iterator[DataRow]:
        for row in questions.rows([name for name in wanted if name != IMAGE]):
            if IMAGE not in wanted:
                yield row
                continue
            if row[apart.on] not in images:
                raise RerouteError(f"{pictures.name} has no image {row[apart.on]!r}, which {questions.name} asks about")
            yield {**row, IMAGE: images[row[apart.on]]}

    def image_files() -> Iterator[Path | None]:
        for row in questions.rows((apart.on,)):
            image = images.get(row[apart.on]) or {}
            named = image.get("bytes") is None and image.get("path") is not None
            yield Path(image["path"]) if named else None

    files = questions.files + pictures.files
    revision = None if pictures.revision is None else f"{questions.revision}, images {pictures.revision}"
    return replace(questions, rows=rows, files=files, images=image_files, revision=revision)


def _and_image(columns: Sequence[str]) -> tuple[str, ...]:
    return tuple(columns) if IMAGE in columns else (*columns, IMAGE)


def _folder(
    path: Path, config: str | None, kinds: Mapping[str, ColumnKind], split: str, columns: Sequence[str]
) -> DataSet:
    within = path / config if config is not None and (path / config).is_dir() else path
    return _files(split_files(within, split), f"{within} [{split}]", columns, kinds)


def _files(files: Sequence[Path], name: str, columns: Sequence[str], kinds: Mapping[str, ColumnKind]) -> DataSet:
    parts = [_json(file, columns) if file.suffix in JSON_SUFFIXES else _parquet(file, columns, kinds) for file in files]

    def rows(wanted: Sequence[str]) -> Iterator[DataRow]:
        for part in parts:
            yield from part.rows(wanted)

    def images() -> Iterator[Path | None]:
        for part in parts:
            yield from part.images()

    return DataSet(name, rows, sum(part.count for part in parts), tuple(files), images)


def _parquet(file: Path, columns: Sequence[str], kinds: Mapping[str, ColumnKind]) -> DataSet:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def read(wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
        try:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=_BATCH, columns=list(wanted)):
                yield from batch.to_pylist()
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise RerouteError(f"{file} cannot be read as parquet ({str(error).splitlines()[0]})") from error

    def rows(wanted: Sequence[str]) -> Iterator[DataRow]:
        return (_beside(row, file) for row in read(wanted))

    def images() -> Iterator[Path | None]:
        """The paths alone: the bytes beside them may be 20 GB. A path beside bytes seldom is that of a file."""
        for row in read((f"{IMAGE}.path",)):
            path = (row.get(IMAGE) or {}).get("path")
            yield None if path is None else file.parent / path

    try:
        schema = pq.read_schema(file)
        count = pq.read_metadata(file).num_rows
    except (OSError, pa.ArrowInvalid) as error:
        raise RerouteError(f"{file} cannot be read as parquet ({str(error).splitlines()[0]})") from error
    _require_columns(schema.names, columns, str(file))
    for column in columns:
        if column in kinds and not kinds[column].right(schema.field(column).type):
            expected = kinds[column].expected
            raise RerouteError(f"column {column} of {file} is {schema.field(column).type}, expected {expected}")
    return DataSet(str(file), rows, count, (file,), images if IMAGE in columns else tuple)


def _json(file: Path, columns: Sequence[str]) -> DataSet:
    def rows(wanted: Sequence[str]) -> Iterator[DataRow]:
        for number, found in json_lines(file):
            row = _json_row(found, columns, f"line {number} of {file}")
            yield _beside({name: row[name] for name in wanted}, file)

    def images() -> Iterator[Path | None]:
        return (Path(row[IMAGE]["path"]) for row in rows((IMAGE,)))

    count = sum(1 for _ in rows(()))
    return DataSet(str(file), rows, count, (file,), images if IMAGE in columns else tuple)


def _json_row(row: dict[str, Any], columns: Sequence[str], where: str) -> DataRow:
    _require_columns(list(row), columns, where)
    if IMAGE not in columns:
        return row
    path = row[IMAGE].get("path") if isinstance(row[IMAGE], dict) else row[IMAGE]
    if not isinstance(path, str) or "\0" in path:
        raise RerouteError(f"{where}: column image is {row[IMAGE]!r}, expected the path of a file")
    return {**row, IMAGE: {"bytes": None, "path": path}}


def _beside(row: dict[str, Any], file: Path) -> DataRow:
    """The row, with the path of an image without bytes taken from the folder of `file`."""
    image = row.get(IMAGE)
    if image and image.get("bytes") is None and image.get("path") is not None:
        return row | {IMAGE: {"bytes": None, "path": str(file.parent / image["path"])}}
    return row


def _hub(name: str, config: str | None, split: str, columns: Sequence[str]) -> DataSet:
    try:
        import datasets
        from huggingface_hub.errors import HTTPError
    except ImportError as error:
        raise RerouteError(f"--data {name} is a hub id and needs `datasets`: pip install 'reroute_jax[hub]'") from error
    try:
        splits = datasets.get_dataset_split_names(name, config)
        if split not in splits:
            raise RerouteError(f"unknown split {split!r} of {name}: expected one of {', '.join(splits)}")
        table = datasets.load_dataset(name, config, split=split)
    except RerouteError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError, HTTPError) as error:
        raise RerouteError(f"data set {name} cannot be loaded ({str(error).splitlines()[0]})") from error
    _require_columns(table.column_names, columns, name)
    encoded = table.select_columns(list(columns))
    if IMAGE in columns:
        encoded = encoded.cast_column(IMAGE, datasets.Image(decode=False))
    # What `datasets` tells versions of a set apart by: made of the revision's data files, it has no public name.
    revision = table._fingerprint
    return DataSet(
        f"{name} [{split}]", lambda wanted: iter(encoded.select_columns(list(wanted))), len(table), revision=revision
    )


def _require_columns(names: Sequence[str], wanted: Sequence[str], where: str) -> None:
    missing = [column for column in wanted if column not in names]
    if missing:
        raise RerouteError(f"{where} lacks the columns {', '.join(missing)}: it has {', '.join(names)}")
