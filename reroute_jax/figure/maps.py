"""An image with its visual tokens shaded, as SVG. Coordinates are pixels of the image that the model sees."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from reroute_jax.figure.tokens import STATES, StageTokens, cell, ranks, strips
from reroute_jax.types import Grid, Size

# Okabe and Ito's colours, told apart with any colour vision; every state has a mark of its own besides.
BLUE, VERMILION, GREEN, ORANGE, PURPLE, INK = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#10151c"
# Of scores by rank, low to high: the seven steps of cividis.
HEAT = ("#00224e", "#2a3f6d", "#575c6d", "#7d7c78", "#a59c74", "#d2c060", "#fee838")
MEANING = {
    "run": "runs in this stage",
    "returned": "runs again after it was deferred",
    "deferred": "is passed by and may return",
    "deleted": "is gone for good",
    "merged": "went into another token before the decoder",
}


@dataclass(frozen=True)
class View:
    """An image as the model sees it, and its grid of visual tokens."""

    pixels: UInt8[np.ndarray, "height width 3"]
    grid: Grid

    @property
    def size(self) -> Size:
        return self.pixels.shape[1], self.pixels.shape[0]

    @property
    def count(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Box:
    """(x1, y1, x2, y2) in fractions of the view. mark: stands at its corner. style: of BOX_STYLES."""

    corners: tuple[float, float, float, float]
    mark: str
    style: int


# Colour, dashes and what is drawn below: the true box, then those of the runs in order.
BOX_STYLES = (
    ("#ffffff", "5 4", "#000000"),
    (BLUE, "", "#ffffff"),
    (VERMILION, "9 4", "#ffffff"),
    (GREEN, "2 4", "#ffffff"),
    (PURPLE, "9 4 2 4", "#ffffff"),
    (ORANGE, "14 4", "#ffffff"),
)


def definitions(name: str, view: View) -> str:
    """The image and its token patterns under ids that start with `name`; drawn nowhere by itself."""
    width, height = view.size
    out = io.BytesIO()
    Image.fromarray(view.pixels).save(out, "PNG", optimize=True)
    data = base64.b64encode(out.getvalue()).decode()
    picture = f'<image id="{name}" width="{width}" height="{height}" href="data:image/png;base64,{data}"/>'
    patterns = _patterns(name, *cell(0, view.grid, view.size)[2:])
    return f'<svg class="rj-defs" width="0" height="0" aria-hidden="true"><defs>{picture}{patterns}</defs></svg>'


def _patterns(name: str, w: float, h: float) -> str:
    """One cell each. A pattern starts at the image's corner, so that every token gets exactly one mark."""

    def pattern(state: str, veil: str, opacity: float, marks: str) -> str:
        size = f'width="{w:g}" height="{h:g}"'
        return (
            f'<pattern id="{name}-{state}" patternUnits="userSpaceOnUse" {size}>'
            f'<rect {size} fill="{veil}" fill-opacity="{opacity}"/>{marks}</pattern>'
        )

    def line(x1: float, y1: float, x2: float, y2: float, ink: str, opacity: float = 0.9) -> str:
        ends = f'x1="{x1 * w:g}" y1="{y1 * h:g}" x2="{x2 * w:g}" y2="{y2 * h:g}"'
        return f'<line {ends} stroke="{ink}" stroke-opacity="{opacity}" stroke-width="{0.09 * min(w, h):g}"/>'

    inset = f'x="{0.1 * w:g}" y="{0.1 * h:g}" width="{0.8 * w:g}" height="{0.8 * h:g}" fill="none"'
    frame = "".join(
        f'<rect {inset} stroke="{ink}" stroke-width="{width * min(w, h):g}"/>'
        for ink, width in (("#ffffff", 0.2), (GREEN, 0.12))
    )
    dot = f'<circle cx="{w / 2:g}" cy="{h / 2:g}" r="{0.16 * min(w, h):g}" fill="#ffffff" stroke="#000000"/>'
    return "".join(
        (
            pattern("returned", GREEN, 0.16, frame),
            pattern("deferred", BLUE, 0.64, line(0.2, 0.8, 0.8, 0.2, "#ffffff", 0.7)),
            pattern(
                "deleted",
                INK,
                0.86,
                line(0.28, 0.28, 0.72, 0.72, "#ffffff", 0.45) + line(0.28, 0.72, 0.72, 0.28, "#ffffff", 0.45),
            ),
            pattern("merged", ORANGE, 0.74, line(0.2, 0.38, 0.8, 0.38, INK) + line(0.2, 0.64, 0.8, 0.64, INK)),
            pattern("chosen", "none", 0.0, dot),
        )
    )


def token_map(name: str, view: View, stage: StageTokens, boxes: Sequence[Box] = ()) -> str:
    """A stage over the image that `definitions` drew under `name`. stage: of this image's tokens alone."""
    shades = "".join(
        _path(name, state, stage.states == number, view)
        for number, state in enumerate(STATES)
        if state != "run" and (stage.states == number).any()
    )
    heat = "" if stage.scores is None else f'<g class="rj-heat">{_heat(name, view, stage)}</g>'
    rows, cols = view.grid
    data = f'data-grid="{rows}x{cols}" data-states="{"".join(map(str, stage.states.tolist()))}"'
    if stage.scores is not None:
        shown = ("" if score == -np.inf else f"{score:.2e}" for score in stage.scores.tolist())
        data += f' data-scores="{",".join(shown)}"'
    label = f"{layers(stage)}: {_counts(stage)}"
    return (
        f'<svg class="rj-map" tabindex="0" role="img" aria-label="{escape(label)}" {_view_box(view)} {data}>'
        f'<use href="#{name}"/><g class="rj-tokens">{shades}</g>{heat}{drawn(boxes, view)}</svg>'
    )


def plain_map(name: str, view: View, boxes: Sequence[Box]) -> str:
    """The image that `definitions` drew under `name`, with boxes."""
    what = "image with boxes" if boxes else "image"
    return (
        f'<svg class="rj-plain" role="img" aria-label="{what}" {_view_box(view)}>'
        f'<use href="#{name}"/>{drawn(boxes, view)}</svg>'
    )


def drawn(boxes: Sequence[Box], view: View) -> str:
    width, height = view.size
    return "".join(_box(one, width, height) for one in boxes)


def _box(box: Box, width: int, height: int) -> str:
    x1, y1, x2, y2 = (value * side for value, side in zip(box.corners, (width, height) * 2, strict=True))
    left, top = min(x1, x2), min(y1, y2)
    place = f'x="{left:g}" y="{top:g}" width="{abs(x2 - x1):g}" height="{abs(y2 - y1):g}"'
    colour, dashes, casing = BOX_STYLES[box.style]
    rect = (
        f'<rect class="rj-case" {place} stroke="{casing}"/>'
        f'<rect class="rj-box" {place} stroke="{colour}" stroke-dasharray="{dashes}"/>'
    )
    if not box.mark:
        return rect
    size = max(width, height) / 17
    # Marks of boxes on each other stand side by side along the upper edge, within the image.
    x = min(max(left, 0) + box.style * 0.8 * size, width - size)
    y = min(max(top - 0.2 * size, size), height)
    text = f'<text class="rj-mark" x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{colour}">{escape(box.mark)}</text>'
    return rect + text


def _heat(name: str, view: View, stage: StageTokens) -> str:
    place = ranks(stage.scores)
    most = place.max()
    steps = np.where(place > 0, (most - place) * len(HEAT) // max(most, 1), -1)
    filled = "".join(
        f'<path d="{_cells(steps == step, view)}" fill="{colour}"/>'
        for step, colour in enumerate(HEAT)
        if (steps == step).any()
    )
    return filled + _path(name, "chosen", stage.running & (place > 0), view)


def _path(name: str, state: str, tokens: np.ndarray, view: View) -> str:
    return f'<path class="rj-{state}" d="{_cells(tokens, view)}" fill="url(#{name}-{state})"/>'


def _cells(tokens: np.ndarray, view: View) -> str:
    parts = []
    for first, count in strips(tokens, view.grid):
        x, y, w, h = cell(first, view.grid, view.size)
        parts.append(f"M{x:g} {y:g}h{count * w:g}v{h:g}h{-count * w:g}z")
    return "".join(parts)


def _view_box(view: View) -> str:
    width, height = view.size
    return f'viewBox="0 0 {width} {height}"'


def layers(stage: StageTokens) -> str:
    return f"layer {stage.lo}" if stage.hi == stage.lo + 1 else f"layers {stage.lo} to {stage.hi - 1}"


def _counts(stage: StageTokens) -> str:
    found = ((state, int((stage.states == number).sum())) for number, state in enumerate(STATES))
    return ", ".join(f"{count} {state}" for state, count in found if count)


def legend(name: str) -> str:
    """What the shades mean; ids start with `name`."""
    side = 16.0
    square = f'width="{side:g}" height="{side:g}"'
    swatches = "".join(
        f'<li><svg class="rj-swatch" {square} aria-hidden="true"><rect class="rj-photo" {square}/>'
        f'<rect {square} fill="{"none" if state == "run" else f"url(#{name}-{state})"}"/></svg>'
        f"<span><b>{state}</b> {MEANING[state]}</span></li>"
        for state in STATES
    )
    ramp = "".join(
        f'<rect x="{9 * step}" width="9" height="{side:g}" fill="{colour}"/>' for step, colour in enumerate(HEAT)
    )
    heat = (
        f'<li><svg class="rj-swatch" width="{9 * len(HEAT)}" height="{side:g}" aria-hidden="true">{ramp}</svg>'
        "<span><b>score</b> low to high by rank, kept tokens dotted</span></li>"
    )
    defs = (
        f'<svg class="rj-defs" width="0" height="0" aria-hidden="true"><defs>{_patterns(name, side, side)}</defs></svg>'
    )
    return f'{defs}<ul class="rj-legend">{swatches}{heat}</ul>'
