"""What the grounding tasks of this folder consist of: the reference's patched tasks, by this project's functions.

As in the reference the environment says how: BBOX_COORD_FORMAT (normalized, pixel or scale_1000) and
REFCOCO_PROMPT_STYLE (full, short or nuwa). lmms-eval loads this file by its path.
"""

import io
import os

import datasets
from PIL import Image

from evals.harness import prompts
from evals.harness.boxes import COORD_FORMATS, normalise_box, parse_box, rec_metrics
from evals.harness.data import PARITY_JPEG_ROUNDTRIPS
from reroute_jax.errors import RerouteError

FEATURES = datasets.Features(
    {
        "question_id": datasets.Value("string"),
        "image": datasets.Image(),
        "image_width": datasets.Value("int64"),
        "image_height": datasets.Value("int64"),
        "answer": datasets.Value("string"),
        "bbox": datasets.List(datasets.Value("float32")),
    }
)
_ROWS = 16  # of the data set at a time; each has an image in memory


def expressions(rows: datasets.Dataset) -> datasets.Dataset:
    """One row an expression, its box as corners in fractions of the image, its image as the model is to get it."""
    rows = rows.cast_column("image", datasets.Image())  # plain parquet does not say that its bytes are one
    return rows.map(_split, batched=True, batch_size=_ROWS, remove_columns=rows.column_names, features=FEATURES)


def image(doc: dict) -> list[Image.Image]:
    return [doc["image"].convert("RGB")]


def text(doc: dict) -> str:
    return prompts.rec(doc["answer"], _setting("REFCOCO_PROMPT_STYLE", prompts.REC_STYLES))


def metrics(doc: dict, results: list[str]) -> dict[str, float]:
    size = doc["image_width"], doc["image_height"]
    box = normalise_box(parse_box(results[0]), _setting("BBOX_COORD_FORMAT", COORD_FORMATS), size)
    return rec_metrics(box, doc["bbox"])


def _split(batch: dict) -> dict:
    found = {name: [] for name in FEATURES}
    columns = (batch[name] for name in ("question_id", "image", "answer", "bbox"))
    for question_id, picture, answers, (x, y, w, h) in zip(*columns, strict=True):
        width, height = picture.size
        stored = _stored(picture)
        corners = [x / width, y / height, (x + w) / width, (y + h) / height]
        for answer in answers:
            row = (question_id, stored, width, height, answer, corners)
            for name, value in zip(FEATURES, row, strict=True):
                found[name].append(value)
    return found


def _stored(picture: Image.Image) -> dict[str, bytes | None]:
    """A JPEG re-saved as often as the reference's preprocessing does, anything else losslessly."""
    saved = io.BytesIO()
    if picture.format == "JPEG":
        for _ in range(PARITY_JPEG_ROUNDTRIPS):
            saved = io.BytesIO()
            picture.save(saved, format="JPEG")
            picture = Image.open(saved)
    else:
        picture.convert("RGB").save(saved, format="PNG")
    return {"bytes": saved.getvalue(), "path": None}


def _setting(name: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name)
    if value not in allowed:
        raise RerouteError(f"the environment variable {name} is {value!r}, expected one of {', '.join(allowed)}")
    return value
