"""What configurations of the literature spend."""

from pathlib import Path

import pytest

from benchmarks.audit import rows, table
from evals.speed.checkpoint_shapes import SHAPES
from reroute_jax.models import read_config

DOCS = Path(__file__).parents[2] / "docs" / "baselines.md"


@pytest.fixture(scope="module")
def text():
    return table(rows(), read_config(SHAPES["llava-1.5-7b"].config("bfloat16")).decoder)


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
