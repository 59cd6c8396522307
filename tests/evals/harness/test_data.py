import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import ExifTags, Image

from evals import pope, scienceqa, textvqa
from evals.harness import vqa
from evals.harness.columns import _hub
from evals.harness.data import REC_COLUMNS, BadImage, DocSource, rec_docs, rec_source
from evals.scenes.data import refcoco_rows
from reroute_jax.engine.images import open_image
from reroute_jax.errors import RerouteError

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
SCHEMA = pa.schema(
    {
        "question_id": pa.string(),
        "image": IMAGE,
        "question": pa.string(),
        "answer": pa.list_(pa.string()),
        "bbox": pa.list_(pa.float32()),
    }
)


def photo(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    """Noise up to black and white: it clips, so that a second JPEG round trip still changes what the first left."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8))


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def with_chunk(png: bytes, kind: bytes, data: bytes) -> bytes:
    """A PNG with one chunk more, behind its header."""
    found = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return png[:33] + found + png[33:]


def row(question_id: str, image: bytes | None, answer: list[str], bbox: list[float] | None = None) -> dict[str, Any]:
    return {
        "question_id": question_id,
        "image": {"bytes": image, "path": None},
        "question": "Describe it.",
        "answer": answer,
        "bbox": bbox or [8.0, 8.0, 24.0, 16.0],
    }


def write(file: Path, rows: list[dict[str, Any]], schema: pa.Schema = SCHEMA) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), file, row_group_size=2)
    return file


@pytest.fixture
def png() -> bytes:
    return encoded(photo(), "PNG")


def read(file: Path, start: int = 0, stop: int = 99, roundtrips: int = 2) -> list:
    return list(rec_docs(rec_source(str(file), None), start, stop, roundtrips))


def test_one_document_per_expression_in_order(tmp_path: Path, png: bytes) -> None:
    answers = [["a", "b"], ["c"], [], ["d", "e", "f"]]
    file = write(tmp_path / "x.parquet", [row(f"q{i}", png, answer) for i, answer in enumerate(answers)])
    assert rec_source(str(file), None).count == 6
    docs = read(file)
    assert [doc.text for doc in docs] == list("abcdef")
    assert [doc.doc_id for doc in docs] == list(range(6))
    assert [doc.question_id for doc in docs] == ["q0", "q0", "q1", "q3", "q3", "q3"]


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (1, 4), (2, 3), (4, 6), (5, 99), (6, 99)])
def test_a_part_is_the_same_as_in_the_whole(tmp_path: Path, png: bytes, start: int, stop: int) -> None:
    answers = [["a", "b"], ["c"], ["d", "e", "f"]]
    file = write(tmp_path / "x.parquet", [row(f"q{i}", png, answer) for i, answer in enumerate(answers)])
    whole = [(doc.doc_id, doc.question_id, doc.text) for doc in read(file)]
    assert [(doc.doc_id, doc.question_id, doc.text) for doc in read(file, start, stop)] == whole[start:stop]


def test_truth_is_rounded_to_float32_and_widened(tmp_path: Path) -> None:
    """The specification's example: 500x400, box (50, 40, 200, 160)."""
    image = encoded(Image.new("RGB", (500, 400)), "PNG")
    (doc,) = read(write(tmp_path / "x.parquet", [row("q", image, ["a"], [50, 40, 200, 160])]))
    assert doc.truth == (0.10000000149011612, 0.10000000149011612, 0.5, 0.5)
    assert doc.size == (500, 400)


def test_box_is_rounded_to_float32_before_the_division(tmp_path: Path, png: bytes) -> None:
    """A column of doubles is read as the float32 column it stands for."""
    wide = SCHEMA.set(4, pa.field("bbox", pa.list_(pa.float64())))
    box = [0.1, 0.2, 33.3, 7.7]
    (double,) = read(write(tmp_path / "x.parquet", [row("q", png, ["a"], box)], wide))
    (single,) = read(write(tmp_path / "y.parquet", [row("q", png, ["a"], box)]))
    assert double.truth == single.truth


def test_jpeg_is_saved_twice_more_byte_for_byte(tmp_path: Path) -> None:
    stored = encoded(photo(), "JPEG", quality=92, subsampling=0)
    once = encoded(Image.open(io.BytesIO(stored)), "JPEG", quality=75, subsampling="4:2:0")
    twice = Image.open(io.BytesIO(encoded(Image.open(io.BytesIO(once)), "JPEG", quality=75, subsampling="4:2:0")))
    file = write(tmp_path / "x.parquet", [row("q", stored, ["a"])])
    assert (np.asarray(read(file)[0].image) == np.asarray(twice)).all()
    clean = np.asarray(Image.open(io.BytesIO(stored)))
    assert (np.asarray(read(file, roundtrips=0)[0].image) == clean).all()
    assert (clean != np.asarray(twice)).any()


def test_jpeg_is_treated_as_the_datasets_library_does(tmp_path: Path) -> None:
    """The reference's own preprocessing: two passes through an image column of `datasets`."""
    stored = encoded(photo(seed=1), "JPEG", quality=90)
    rows = {"image": [{"bytes": stored, "path": None}]}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()}))
    mapped = table.map(lambda example: {"image": example["image"]}, load_from_cache_file=False)
    again = datasets.Dataset.from_list(list(mapped))
    (doc,) = read(write(tmp_path / "x.parquet", [row("q", stored, ["a"])]))
    assert (np.asarray(doc.image) == np.asarray(again[0]["image"])).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_png_is_unharmed_and_becomes_rgb(tmp_path: Path, mode: str) -> None:
    image = photo().convert(mode)
    (doc,) = read(write(tmp_path / "x.parquet", [row("q", encoded(image, "PNG"), ["a"])]))
    assert doc.image.mode == "RGB"
    assert (np.asarray(doc.image) == np.asarray(image.convert("RGB"))).all()


def test_grey_jpeg_is_resaved_as_grey(tmp_path: Path) -> None:
    grey = photo().convert("L")
    stored = encoded(grey, "JPEG")
    saved = Image.open(io.BytesIO(stored))
    for _ in range(2):
        saved = Image.open(io.BytesIO(encoded(saved, "JPEG")))
    (doc,) = read(write(tmp_path / "x.parquet", [row("q", stored, ["a"])]))
    assert (np.asarray(doc.image) == np.asarray(saved.convert("RGB"))).all()


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    stored = encoded(photo(96, 64), "JPEG", exif=exif)
    (doc,) = read(write(tmp_path / "x.parquet", [row("q", stored, ["a"])]))
    assert doc.size == doc.image.size == (64, 96)


def test_image_path_is_relative_to_the_parquet_file(tmp_path: Path, png: bytes) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png)
    there = row("q0", None, ["a"]) | {"image": {"bytes": None, "path": "pictures/a.png"}}
    absent = row("q1", None, ["b"]) | {"image": {"bytes": None, "path": "pictures/b.png"}}
    file = write(tmp_path / "x.parquet", [there, absent])
    docs = rec_docs(rec_source(str(file), None), 0, 9, 2)
    assert next(docs).size == (96, 64)
    with pytest.raises(RerouteError, match=r"q1.*b\.png does not exist"):
        next(docs)


def test_missing_and_corrupt_images_are_named(tmp_path: Path, png: bytes) -> None:
    with pytest.raises(RerouteError, match=r"x\.parquet, question_id q7: there is no image"):
        read(write(tmp_path / "x.parquet", [row("q7", None, ["a"])]))
    with pytest.raises(RerouteError, match=r"question_id q8: there is no image"):
        read(write(tmp_path / "x.parquet", [row("q8", None, ["a"]) | {"image": None}]))
    for broken in (png[: len(png) // 2], b"no image at all", b""):
        with pytest.raises(RerouteError, match=r"question_id q9: the image cannot be decoded") as caught:
            read(write(tmp_path / "x.parquet", [row("q9", broken, ["a"])]))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "P, transparent", "RGB, transparent", "RGBA", "LA", "CMYK", "I;16", "I", "F"]
)
def test_modes_become_rgb_by_the_rule_of_lmms_eval(tmp_path: Path, mode: str) -> None:
    """Plain `convert("RGB")`: no white under transparency, neither here nor where the model opens the image again."""
    base, _, transparent = mode.partition(", ")
    image = photo().convert("RGBA").convert(base) if base != "I;16" else photo().convert("I").convert("I;16")
    options = {"transparency": image.getpixel((3, 3))} if transparent else {}
    stored = encoded(image, "PNG" if base in ("P", "RGB", "RGBA") else "TIFF", **options)
    expected = np.asarray(Image.open(io.BytesIO(stored)).convert("RGB"))
    (doc,) = read(write(tmp_path / "x.parquet", [row("q", stored, ["a"])]))
    assert (np.asarray(doc.image) == expected).all()
    assert (np.asarray(open_image(doc.image)) == expected).all()


@pytest.mark.parametrize("kind", ["bomb", "text", "exif", "closed form"])
def test_odd_images_are_bad_rows_or_whole(tmp_path: Path, png: bytes, kind: str, monkeypatch) -> None:
    odd = {
        "bomb": png,
        "text": with_chunk(png, b"zTXt", b"key\0\0" + zlib.compress(b"x" * (1 << 21))),
        "exif": with_chunk(png, b"eXIf", b"broken"),
        "closed form": b"GIF89a",
    }[kind]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000 if kind == "bomb" else 1 << 20)
    file = write(tmp_path / "x.parquet", [row("q5", odd, ["a"])])
    if kind == "exif":
        assert (np.asarray(read(file)[0].image) == np.asarray(photo())).all()
        return
    with pytest.raises(BadImage, match=r"x\.parquet, question_id q5: .*repair it or give --skip-bad") as caught:
        read(file)
    (doc,) = rec_docs(rec_source(str(file), None), 0, 9, 2, skip_bad=True)
    assert doc.image is None and doc.bad == str(caught.value) and "\n" not in doc.bad


def test_bad_boxes_are_named(tmp_path: Path, png: bytes) -> None:
    for box in ([1.0, 2.0, 3.0], [1.0, 2.0, float("nan"), 4.0]):
        with pytest.raises(RerouteError, match=r"question_id q: bbox is .*expected 4 finite numbers"):
            read(write(tmp_path / "x.parquet", [row("q", png, ["a"], box)]))


@pytest.mark.parametrize(
    "box",
    [
        [1.0, 2.0, 0.0, 4.0],
        [1.0, 2.0, 3.0, -4.0],
        [1.0, 2.0, -3.0, -4.0],
        [1.0, 2.0, 1e-46, 4.0],  # nothing is left of it in float32
        [1e8, 2.0, 1e-3, 4.0],
        [float("inf"), 2.0, 3.0, 4.0],
        [1.0, 2.0, 1e39, 4.0],
    ],
)
def test_boxes_without_an_area_are_refused_by_row(tmp_path: Path, png: bytes, box: list[float]) -> None:
    wide = SCHEMA.set(4, pa.field("bbox", pa.list_(pa.float64())))
    rows = [row("q0", png, ["a"]), row("q1", png, []), row("q2", png, ["b"], box)]
    with pytest.raises(RerouteError, match=r"x\.parquet.*question_id q2: bbox is "):
        read(write(tmp_path / "x.parquet", rows, wide))


@pytest.mark.parametrize("box", ["1234", ["1", "2", "3", "4"], [1, 2, True, 4], None, 7, {"x": 1}, [1, 2, 10**400, 4]])
def test_boxes_that_are_no_numbers_are_refused_before_any_image_is_read(tmp_path: Path, box: Any) -> None:
    row = {"question_id": "q0", "image": "absent.png", "answer": ["a"], "bbox": box}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    with pytest.raises(RerouteError, match=r"row 0, question_id q0: bbox is .*expected 4 finite numbers"):
        rec_source(str(tmp_path / "x.jsonl"), None)


@pytest.mark.parametrize("missing", [None, float("nan"), "", True], ids=str)
def test_rows_without_an_id_are_refused(tmp_path: Path, missing: Any) -> None:
    """All of them would be one cluster, and their intervals those of a single question."""
    with pytest.raises(
        RerouteError, match=r"x.jsonl, row 0: question_id is .*, expected a text or a number of its own"
    ):
        rec_source(str(jsonl(tmp_path, question_id=missing, answer=["a"], bbox=[1, 2, 3, 4])), None)
    for benchmark, row in (
        (textvqa.BENCHMARK, {"question_id": missing, "question": "q", "answers": ["a"]}),
        (pope.BENCHMARK, {"id": missing, "question": "q", "answer": "yes", "image_source": "x"}),
        (pope.BENCHMARK, {"id": 1, "question": "q", "answer": "yes", "image_source": missing}),
        (scienceqa.BENCHMARK, {"question": "q", "choices": ["a", "b"], "answer": True, "hint": ""}),
    ):
        source = vqa.row_source(benchmark, str(jsonl(tmp_path, **row)), None)
        with pytest.raises(RerouteError, match=r"x.jsonl, (row|id) \d: \w+ is .*, expected"):
            list(vqa.make_task(benchmark, source, None, 16).docs(0))


def jsonl(folder: Path, **row: Any) -> Path:
    (folder / "x.jsonl").write_text(json.dumps({**row, "image": "none.png"}))
    return folder / "x.jsonl"


def test_text_that_is_not_utf8_in_parquet_is_refused(tmp_path: Path, png: bytes) -> None:
    answers = pa.array([[b"caf\xe9"]], pa.list_(pa.binary())).cast(pa.list_(pa.string()), safe=False)
    table = pa.Table.from_pylist([row("q0", png, ["a"])], SCHEMA).set_column(3, SCHEMA.field("answer"), answers)
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(RerouteError, match=r"x\.parquet cannot be read as parquet"):
        rec_source(str(tmp_path / "x.parquet"), None)


def test_missing_columns_are_named(tmp_path: Path, png: bytes) -> None:
    schema = pa.schema([field for field in SCHEMA if field.name not in ("bbox", "answer")])
    file = write(tmp_path / "x.parquet", [row("q", png, ["a"])], schema)
    with pytest.raises(RerouteError, match=r"lacks the columns answer, bbox: it has question_id, image, question$"):
        rec_source(str(file), None)


@pytest.mark.parametrize(
    ("column", "kind", "expected"),
    [
        ("image", pa.string(), "a struct of bytes and path"),
        ("answer", pa.string(), "a list of strings"),
        ("bbox", pa.list_(pa.string()), "a list of 4 numbers"),
    ],
)
def test_columns_of_a_wrong_type_are_named(tmp_path: Path, column: str, kind: pa.DataType, expected: str) -> None:
    schema = SCHEMA.set(SCHEMA.get_field_index(column), pa.field(column, kind))
    pq.write_table(schema.empty_table(), tmp_path / "x.parquet")
    with pytest.raises(RerouteError, match=rf"column {column} of .* is .*expected {expected}"):
        rec_source(str(tmp_path / "x.parquet"), None)


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    with pytest.raises(RerouteError, match=r"x\.parquet cannot be read as parquet"):
        rec_source(str(tmp_path / "x.parquet"), None)


def test_data_without_an_expression_is_refused(tmp_path: Path, png: bytes) -> None:
    with pytest.raises(RerouteError, match="no referring expression"):
        rec_source(str(write(tmp_path / "x.parquet", [row("q", png, [])])), None)


def test_folder_in_the_hubs_layout(tmp_path: Path, png: bytes) -> None:
    for shard, name in enumerate(("val-00000-of-00002", "val-00001-of-00002", "testA-00000-of-00001")):
        write(tmp_path / "data" / f"{name}.parquet", [row(f"q{shard}", png, [f"from {name}"])])
    source = rec_source(str(tmp_path), None)
    assert source.count == 2
    assert [doc.question_id for doc in rec_docs(source, 0, 9, 2)] == ["q0", "q1"]
    assert rec_source(str(tmp_path), "testA").count == 1
    with pytest.raises(RerouteError, match=r"unknown split 'testB'.*testA, val"):
        rec_source(str(tmp_path), "testB")


def test_folder_without_parquet_and_file_with_a_split_are_refused(tmp_path: Path, png: bytes) -> None:
    with pytest.raises(RerouteError, match="holds no parquet files"):
        rec_source(str(tmp_path), None)
    file = write(tmp_path / "x.parquet", [row("q", png, ["a"])])
    with pytest.raises(RerouteError, match="leave --split out"):
        rec_source(str(file), "val")


def test_a_name_that_is_nothing_is_refused() -> None:
    for name in ("refcoco", "/no/such/folder", "data/missing.parquet"):
        with pytest.raises(RerouteError, match="expected 'scenes', 'hub', a hub id owner/name, or local parquet"):
            rec_source(name, None)


def test_hub_loader_reads_a_hub_like_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` reads a local folder as it reads a repository, so the loader is exercised without a network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    stored = encoded(photo(), "JPEG")
    write(tmp_path / "owner" / "name" / "data" / "val-00000-of-00001.parquet", [row("q", stored, ["a", "b"])])
    table = _hub(str(tmp_path / "owner" / "name"), None, "val", REC_COLUMNS)
    assert table.count == 1
    source = DocSource(table.name, lambda: table.rows(REC_COLUMNS), 2)
    hub, local = rec_docs(source, 0, 9, 2), rec_docs(rec_source("owner/name", None), 0, 9, 2)
    for one, other in zip(hub, local, strict=True):
        assert (one.text, one.truth, one.question_id) == (other.text, other.truth, other.question_id)
        assert (np.asarray(one.image) == np.asarray(other.image)).all()
    with pytest.raises(RerouteError, match="unknown split 'testA'"):
        _hub(str(tmp_path / "owner" / "name"), None, "testA", REC_COLUMNS)
    assert _hub(str(tmp_path / "owner" / "name"), None, "val", REC_COLUMNS).revision == table.revision
    write(tmp_path / "owner" / "name" / "data" / "val-00000-of-00001.parquet", [row("q", stored, ["a", "c"])])
    assert _hub(str(tmp_path / "owner" / "name"), None, "val", REC_COLUMNS).revision != table.revision


def test_scenes_are_read_as_they_are_made() -> None:
    source = rec_source("scenes", None)
    assert source.count is None
    assert source.name == "scenes [test]"
    docs = list(rec_docs(source, 3, 8, 2))
    rows = list(refcoco_rows("test", 8))
    expressions = [(r, expression) for r in rows for expression in r["answer"]][3:8]
    for doc, (r, expression) in zip(docs, expressions, strict=True):
        assert (doc.text, doc.question_id) == (expression, r["question_id"])
        assert (np.asarray(doc.image) == np.asarray(r["image"])).all()
        x, y, w, h = r["bbox"]
        side = r["image"].width
        assert doc.truth == pytest.approx((x / side, y / side, (x + w) / side, (y + h) / side), abs=1e-7)


def test_scenes_are_drawn_for_the_models_family() -> None:
    docs = list(rec_docs(rec_source("scenes", None, "qwen2_5_vl"), 0, 12, 2))
    rows = [r for r in refcoco_rows("test", 12, family="qwen2_5_vl") for _ in r["answer"]][:12]
    assert len({doc.size for doc in docs}) > 3
    for doc, r in zip(docs, rows, strict=True):
        assert doc.image.tobytes() == r["image"].tobytes()
        x, y, w, h = r["bbox"]
        width, height = r["image"].size
        assert doc.truth == pytest.approx((x / width, y / height, (x + w) / width, (y + h) / height), abs=1e-7)


def test_unknown_split_of_the_scenes_is_refused() -> None:
    with pytest.raises(RerouteError, match="testA"):
        rec_source("scenes", "testA")
