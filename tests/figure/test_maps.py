"""The SVG of one stage: sound markup, shades of the right cells, ids that exist, text that cannot break out."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from reroute_jax.figure.card import Routed, ShownAnswer, ShownQuestion, card, routed_figure
from reroute_jax.figure.maps import Box, View, token_map
from reroute_jax.figure.tokens import DEFERRED, RETURNED, RUN, StageTokens

VIEW = View(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8), (2, 3))
STAGE = StageTokens(1, 3, np.array([RUN, DEFERRED, DEFERRED, DEFERRED, RETURNED, RUN]), np.arange(6.0))
ROUTED = Routed(
    "pdrop reroute", (StageTokens(0, 1, np.zeros(6, int), None), STAGE), kv_tokens=(10, 7, 7), kv_bytes=24_000
)
HOSTILE = '<script>alert("1")</script>'
QUESTION = ShownQuestion(
    HOSTILE, HOSTILE, HOSTILE, (0.1, 0.1, 0.5, 0.9), (VIEW,),
    (
        ShownAnswer(HOSTILE, HOSTILE, True, "IoU 0.71", (0.2, 0.1, 0.5, 0.9), ROUTED),
        ShownAnswer("delete", "", False, "", None, replace(ROUTED, label="delete")),
    ),
    (HOSTILE,),
)  # fmt: skip


def parsed(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{html}</div>")


def test_shades_cover_their_cells():
    svg = parsed(token_map("img", VIEW, STAGE))[0]
    paths = {path.get("class"): path.get("d") for path in svg.iter("path") if path.get("class")}
    assert paths["rj-deferred"] == "M20 0h40v20h-40zM0 20h20v20h-20z"
    assert paths["rj-returned"] == "M20 20h20v20h-20z"
    assert "rj-run" not in paths
    assert paths["rj-chosen"] == "M0 0h20v20h-20zM20 20h40v20h-40z"
    assert svg.get("data-states") == "022210"
    assert svg.get("aria-label") == "layers 1 to 2: 2 run, 1 returned, 3 deferred"


def test_a_box_stands_in_pixels_of_the_view():
    svg = parsed(token_map("img", VIEW, STAGE, [Box((0.5, 0.25, 1.0, 0.75), "1", 1)]))[0]
    box = next(rect for rect in svg.iter("rect") if rect.get("class") == "rj-box")
    assert [float(box.get(name)) for name in ("x", "y", "width", "height")] == [30, 10, 30, 20]


@pytest.mark.parametrize("html", [card(QUESTION), routed_figure([VIEW], ROUTED).html])
def test_markup_is_sound_and_complete(html):
    root = parsed(html)
    assert not list(root.iter("script"))
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(|href=")#([\w-]+)', html)
    assert used and set(used) <= set(ids)
    assert not re.search(r'(?:href|src)="(?!#|data:)', html)


def test_a_card_tells_answers_costs_and_verdicts():
    text = " ".join(parsed(card(QUESTION)).itertext())
    for expected in (
        HOSTILE,
        "✓ right",
        "✗ wrong",
        "IoU 0.71",
        "24,000",
        "3 of 6 run",
        "layers 1 to 2",
        "an empty answer",
    ):
        assert expected in text


def test_a_run_of_all_tokens_says_so():
    plain = Routed("none", (StageTokens(0, 2, np.zeros(6, int), None),), (8, 8), 100)
    assert "All 6 visual tokens run in every layer" in routed_figure([VIEW], plain).html


def test_a_prompt_without_an_image_says_so():
    nothing = Routed("none", (StageTokens(0, 2, np.zeros(0, int), None),), (8, 8), 100)
    assert "The prompt has no image" in routed_figure([], nothing).html
