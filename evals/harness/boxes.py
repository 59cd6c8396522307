"""Boxes in answers: parsing, normalising and scoring, the way the RefCOCO reference does it (lmms-eval v0.7.1 + patch).

A box is (x1, y1, x2, y2). Pure Python. No answer raises, and none gives NaN or infinity.
"""

import re
import sys
from collections.abc import Sequence
from numbers import Real

from reroute_jax.errors import RerouteError

Box = tuple[float, float, float, float]

COORD_FORMATS = ("normalized", "pixel", "scale_1000")
THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
REC_METRICS = ("refcoco_IoU", *(f"refcoco_ACC@{t}" for t in THRESHOLDS), "refcoco_Center_ACC")
RESIZED = "_resized"  # a metric with pixels divided by the size that the model saw, not by the stored image's

EDGE = 1e-6  # fractions of an image: what float32 makes of a box that ends at the image's edge
NULL_BOX: Box = (0.0, 0.0, 0.0, 0.0)
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)"
_FOUR = ",".join([_NUMBER] * 4)
_BRACKETS = re.compile(rf"\[{_FOUR}\s*\]")
_PARENTHESES = re.compile(rf"\({_FOUR}\s*\)")


def parse_box(text: str) -> Box:
    """What `find_box` finds, else NULL_BOX."""
    return find_box(text) or NULL_BOX


def find_box(text: str) -> Box | None:
    """First box in square brackets, else the first in parentheses, else None.

    A number too large for a double becomes the largest double, so that every record stays valid JSON.
    """
    found = _BRACKETS.search(text) or _PARENTHESES.search(text)
    if found is None:
        return None
    largest = sys.float_info.max
    return tuple(min(max(float(number), -largest), largest) for number in found.groups())


def shrunk(size: tuple[int, int], shares: Sequence[Real]) -> tuple[float, float]:
    """(width, height) of a frame that shrank to these shares of its own."""
    return float(size[0] * shares[0]), float(size[1] * shares[1])


def normalise_box(box: Sequence[float], coord_format: str, size: tuple[float, float]) -> Box:
    """Box in fractions of the image; `size` is (width, height) in pixels of the frame that the box is taken to be in.

    A box without any value above 1 is taken as normalised in every format; nothing is clipped or reordered. Raises
    RerouteError for a format not in COORD_FORMATS.
    """
    if coord_format not in COORD_FORMATS:
        raise RerouteError(f"unknown coordinate format {coord_format!r}: expected one of {', '.join(COORD_FORMATS)}")
    if coord_format == "normalized" or max(box) <= 1.0:
        return tuple(box)
    width, height = size if coord_format == "pixel" else (1000, 1000)
    x1, y1, x2, y2 = box
    return x1 / width, y1 / height, x2 / width, y2 / height


def beyond_image(truth: Sequence[float]) -> bool:
    """Whether a box in fractions of the image reaches out of it, by more than rounding to float32 does."""
    return min(truth) < -EDGE or max(truth) > 1 + EDGE


def iou(predicted: Sequence[float], truth: Sequence[float]) -> float:
    """Intersection over union; areas are signed products, so a box with both corners swapped is merely elsewhere.

    Without an intersection the result is 0 whatever the union is (the reference divides by zero where the two signed
    areas cancel).
    """
    dx = min(predicted[2], truth[2]) - max(predicted[0], truth[0])
    dy = min(predicted[3], truth[3]) - max(predicted[1], truth[1])
    if dx <= 0 or dy <= 0:
        return 0.0
    return dx * dy / (_area(predicted) + _area(truth) - dx * dy)


def rec_metrics(predicted: Sequence[float], truth: Sequence[float]) -> dict[str, float]:
    """One question's share of each of REC_METRICS, all in [0, 1]; boxes in the same frame."""
    overlap = iou(predicted, truth)
    x, y = (predicted[0] + predicted[2]) / 2, (predicted[1] + predicted[3]) / 2
    centre = truth[0] <= x <= truth[2] and truth[1] <= y <= truth[3]
    values = (overlap, *(float(overlap >= t) for t in THRESHOLDS), float(centre))
    return dict(zip(REC_METRICS, values, strict=True))


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
