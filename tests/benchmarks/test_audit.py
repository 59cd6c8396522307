"""What configurations of the literature spend."""

from pathlib import Path

import pytest

from benchmarks.audit import rows, table
from evals.speed.checkpoint_shapes import SHAPES
from reroute_jax.models import read_config

DOCS = Path(__file__).parents[2] / "docs" / "baselines.md"


@pytest.fixture(scope="module")
def text():
    return table(rows(), read_config(SHAPES["llava-1.5-7b"].config("bfloat16")))


def test_the_page_holds_the_table(text):
    assert text in DOCS.read_text()


@pytest.mark.parametrize(
    ("name", "called", "average"),
    [
        # (2 * 576 + 30 * 144) / 32, (8 * (576 + 288 + 144 + 72)) / 32, (3 * 576 + 14 * 288 + 5 * 144 + 10) / 32
        ("FastV, K=2, R=75%", "192 (**not that**)", "171.0"),
        ("PyramidDrop, layers 8, 16, 24, half", "", "270.0"),
        ("V2Drop", "192 (**not that**)", "202.8"),
        ("PyramidDrop's layers 8, 16, 24 with one", "128 (**cannot be**)", "144.8"),
        ("Nuwa 64", "64", "64.0"),
        ("llava15_ours_vs_pdrop_avg64", "64 (**not that**)", "84.1"),
    ],
)
def test_rows(text, name, called, average):
    line = next(line for line in text.splitlines() if line.startswith(f"| {name}"))
    assert [cell.strip() for cell in line.split("|")[2:4]] == [called, average]


def test_what_comes_before_the_decoder_is_shown_where_it_is_spent(text):
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[6] for line in text.splitlines()[2:]}
    assert cells["all tokens"] == cells["llava15_fastv_K3_avg64 (Reroute's release)"] == ""
    # Of 1,024 numbers each: the metric's keys, its query and its products; cosines and sums of 112 anchors (20).
    macs = 576 * 1024**2 + 1024**2 + 576 * 1024 + 2 * 112 * 576 * 1024
    assert cells["Nuwa 64 (its paper)"] == f"{macs / 1e9:.2f}" == "0.74"
