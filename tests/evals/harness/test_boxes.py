import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.harness.boxes import (
    COORD_FORMATS,
    NULL_BOX,
    REC_METRICS,
    THRESHOLDS,
    iou,
    normalise_box,
    parse_box,
    rec_metrics,
)
from reroute_jax.errors import RerouteError

SIZE = (500, 400)
GT = (0.10000000149011612, 0.10000000149011612, 0.5, 0.5)
FENCED = '```json\n[\n\t{"bbox_2d": [50, 40, 250, 200], "label": "left man"}\n]\n```'
TWO_BOXES = '[{"bbox_2d": [0, 0, 50, 40]}, {"bbox_2d": [50, 40, 250, 200]}]'
TRUE_BOX = (0.1, 0.1, 0.5, 0.5)
NULL = (0, 0, 0, 0)

# The specification's worked examples: format, answer, parsed, normalised, IoU, ACC@0.1 .. 0.9, Center_ACC.
EXAMPLES = [
    ("normalized", "[0.1, 0.1, 0.5, 0.5]", TRUE_BOX, TRUE_BOX, 1.0, "11111", 1),
    ("normalized", "Sure: (0.1, 0.1, 0.5, 0.45)", (0.1, 0.1, 0.5, 0.45), (0.1, 0.1, 0.5, 0.45), 0.875, "11110", 1),
    ("normalized", "[0.10, 0.10, 0.50, 0.30]", (0.1, 0.1, 0.5, 0.3), (0.1, 0.1, 0.5, 0.3), 0.5, "11000", 1),
    ("normalized", "[0.4, 0.4, 0.9, 0.9]", (0.4, 0.4, 0.9, 0.9), (0.4, 0.4, 0.9, 0.9), 0.025, "00000", 0),
    ("normalized", "[0.3 ,0.1, 0.5, 0.5]", NULL, NULL, 0, "00000", 0),
    ("normalized", "[0.1, 0.1, 0.5]", NULL, NULL, 0, "00000", 0),
    ("normalized", "[50, 40, 250, 200]", (50, 40, 250, 200), (50, 40, 250, 200), 0, "00000", 0),
    ("pixel", FENCED, (50, 40, 250, 200), TRUE_BOX, 1.0, "11111", 1),
    (
        "pixel",
        '```json\n[{"bbox_2d": [53, 39, 266, 196]}]\n```',
        (53, 39, 266, 196),
        (0.106, 0.0975, 0.532, 0.49),
        0.885419,
        "11110",
        1,
    ),
    ("pixel", TWO_BOXES, (0, 0, 50, 40), (0, 0, 0.1, 0.1), 0, "00000", 0),
    ("pixel", '{"bbox_2d": [50, 40, 250', NULL, NULL, 0, "00000", 0),
    ("pixel", "[0.1, 0.1, 0.5, 0.5]", TRUE_BOX, TRUE_BOX, 1.0, "11111", 1),
    ("pixel", "[250, 200, 50, 40]", (250, 200, 50, 40), (0.5, 0.5, 0.1, 0.1), 0, "00000", 1),
    ("scale_1000", "[100, 100, 500, 500]", (100, 100, 500, 500), TRUE_BOX, 1.0, "11111", 1),
]


@pytest.mark.parametrize(("coord_format", "answer", "parsed", "normalised", "overlap", "hits", "centre"), EXAMPLES)
def test_worked_examples(
    coord_format: str, answer: str, parsed: tuple, normalised: tuple, overlap: float, hits: str, centre: int
) -> None:
    box = parse_box(answer)
    assert box == parsed
    scaled = normalise_box(box, coord_format, SIZE)
    assert scaled == pytest.approx(normalised, rel=1e-15)
    scores = rec_metrics(scaled, GT)
    assert scores["refcoco_IoU"] == pytest.approx(overlap, abs=5e-7)
    assert [scores[f"refcoco_ACC@{t}"] for t in THRESHOLDS] == [float(hit) for hit in hits]
    assert scores["refcoco_Center_ACC"] == centre


@pytest.mark.parametrize("answer", ["[0.1, 0.1, 0.5, 0.5]", "[0.10, 0.10, 0.50, 0.30]"])
def test_float32_truth_keeps_exact_answers_just_below(answer: str) -> None:
    exact = 1.0 if answer.startswith("[0.1,") else 0.5
    value = iou(parse_box(answer), GT)
    assert exact - 1e-6 < value < exact


def test_metric_names_are_those_of_lmms_eval() -> None:
    accuracies = [f"refcoco_ACC@{t}" for t in ("0.1", "0.3", "0.5", "0.7", "0.9")]
    assert list(rec_metrics(NULL_BOX, GT)) == ["refcoco_IoU", *accuracies, "refcoco_Center_ACC"] == list(REC_METRICS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(1, 2, 3, 4) [5, 6, 7, 8]", (5, 6, 7, 8)),
        ("(1, 2, 3, 4) (5, 6, 7, 8)", (1, 2, 3, 4)),
        ("[[1, 2, 3, 4]]", (1, 2, 3, 4)),
        ("[\n1,\t2,\n 3,4 \n]", (1, 2, 3, 4)),
        ("[-1, -2.5, 3, 4]", (-1, -2.5, 3, 4)),
        ("[1,2,3,4", NULL),
        ("[1, 2, 3, 4)", NULL),
        ("[1 , 2, 3, 4]", NULL),
        ("[.5, 2, 3, 4]", NULL),
        ("[5., 2, 3, 4]", NULL),
        ("[1e-1, 2, 3, 4]", NULL),
        ("[+1, 2, 3, 4]", NULL),
        ("[1%, 2, 3, 4]", NULL),
        ("[1, 2, 3, 4,]", NULL),
        ("[1, 2, 3, 4, 5]", NULL),
        ("[[1, 2], [3, 4]]", NULL),
        ("[\N{FULLWIDTH DIGIT ONE}, 2, 3, 4]", (1, 2, 3, 4)),
        ("", NULL),
    ],
)
def test_parsing_rules(text: str, expected: tuple) -> None:
    assert parse_box(text) == expected


def test_one_value_above_one_scales_all_four() -> None:
    assert normalise_box((0.5, 0.5, 1.0, 2.0), "pixel", (10, 20)) == (0.05, 0.025, 0.1, 0.1)
    assert normalise_box((0.5, 0.5, 1.0, 1.0), "pixel", (10, 20)) == (0.5, 0.5, 1.0, 1.0)
    assert normalise_box((-300, -300, 1.0, 1.0), "scale_1000", (10, 20)) == (-300, -300, 1.0, 1.0)


def test_unknown_coordinate_format_is_refused() -> None:
    with pytest.raises(RerouteError, match=r"'pixels'.*normalized, pixel, scale_1000"):
        normalise_box(NULL_BOX, "pixels", SIZE)


def test_null_box_hits_the_centre_of_a_truth_in_the_corner() -> None:
    assert rec_metrics(NULL_BOX, (0.0, 0.0, 0.5, 0.5))["refcoco_Center_ACC"] == 1
    assert rec_metrics(NULL_BOX, (0.0, 0.1, 0.5, 0.5))["refcoco_Center_ACC"] == 0


def test_cancelling_areas_score_zero() -> None:
    assert iou((0.75, 0.25, 0.25, 0.75), (0.25, 0.25, 0.75, 0.75)) == 0.0


NUMBER = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False).map(lambda x: f"{x:f}"), st.integers().map(str), st.just("9" * 400)
)
BOXLIKE = st.lists(NUMBER, min_size=3, max_size=5).map(lambda n: f"[{', '.join(n)}]")


@given(text=st.one_of(st.text(), BOXLIKE), coord_format=st.sampled_from(COORD_FORMATS))
def test_every_answer_gives_finite_scores(text: str, coord_format: str) -> None:
    box = normalise_box(parse_box(text), coord_format, SIZE)
    assert all(map(math.isfinite, box))
    assert all(0 <= value <= 1 for value in rec_metrics(box, GT).values())


@given(values=st.lists(st.integers(0, 100), min_size=8, max_size=8))
def test_overlap_against_counted_cells(values: list[int]) -> None:
    """Integer boxes overlap in whole cells; counted on a grid, with exact fractions."""
    pairs = (values[:4], values[4:])
    a, b = ((min(v[0], v[2]), min(v[1], v[3]), max(v[0], v[2]) + 1, max(v[1], v[3]) + 1) for v in pairs)
    cells = np.zeros((2, 102, 102), bool)
    for layer, (x1, y1, x2, y2) in zip(cells, (a, b), strict=True):
        layer[y1:y2, x1:x2] = True
    expected = Fraction(int(cells.all(axis=0).sum()), int(cells.any(axis=0).sum()))
    assert iou(a, b) == pytest.approx(float(expected), rel=1e-12)
