"""One question: its image, the answers of its runs side by side, and what every visual token did in each stage."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import pairwise

from reroute_jax.figure.maps import BOX_STYLES, Box, View, definitions, layers, legend, plain_map, token_map
from reroute_jax.figure.tokens import StageTokens, per_layer

STYLE = files("reroute_jax.figure").joinpath("figure.css").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Routed:
    """What one run did with one prompt. kv_tokens: cached after prefill, by decoder layer, text included."""

    label: str
    stages: tuple[StageTokens, ...]
    kv_tokens: tuple[int, ...]
    kv_bytes: int

    @property
    def visual(self) -> int:
        """Visual tokens before any merge."""
        return len(self.stages[0].states)

    @property
    def average(self) -> float:
        """Visual tokens that run in a layer."""
        counts = per_layer(self.stages)
        return sum(counts) / len(counts)

    @property
    def plain(self) -> bool:
        """Every token runs in every layer."""
        return all(stage.running.all() for stage in self.stages)


@dataclass(frozen=True)
class ShownAnswer:
    """A run's answer. right: None where the question alone does not tell. score: as text. box: in fractions of the
    first view."""

    name: str
    text: str
    right: bool | None
    score: str
    box: tuple[float, float, float, float] | None
    routed: Routed


@dataclass(frozen=True)
class ShownQuestion:
    """truth: as text. truth_box: in fractions of the first view. notes: sentences below the picture."""

    title: str
    text: str
    truth: str
    truth_box: tuple[float, float, float, float] | None
    views: tuple[View, ...]
    answers: tuple[ShownAnswer, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figure:
    """A piece of HTML with its style, which a notebook displays."""

    html: str

    def _repr_html_(self) -> str:
        return self.html


def routed_figure(views: Sequence[View], routed: Routed) -> Figure:
    """The stages of one prompt by themselves."""
    names = _names(views, routed.label)
    defs = "".join(map(definitions, names, views))
    legend_name = f"{names[0]}-legend" if names else "rj-legend"
    body = f"{defs}{legend(legend_name)}{_run(routed, routed.label, views, names, ())}"
    return Figure(f'<style>{STYLE}</style><div class="rj rj-alone">{body}</div>')


def card(question: ShownQuestion, attributes: str = "") -> str:
    """`attributes`: of the HTML element, escaped."""
    views, answers = question.views, question.answers
    names = _names(views, question.title)
    true = [] if question.truth_box is None else [Box(question.truth_box, "", 0)]
    boxes = true + [
        Box(one.box, str(number), _style(number)) for number, one in enumerate(answers, 1) if one.box is not None
    ]
    pictures = "".join(
        plain_map(name, view, [] if place else boxes)
        for place, (name, view) in enumerate(zip(names, views, strict=True))
    )
    rows = "".join(_answer(number, one) for number, one in enumerate(answers, 1))
    truth_key = _key(0) if true else ""
    notes = "".join(f'<p class="rj-note">{escape(note)}</p>' for note in question.notes)
    runs = "".join(_run(one.routed, one.name, views, names, true) for one in answers)
    return (
        f'<article class="rj rj-card" {attributes}><header><h3>{escape(question.title)}</h3>'
        f'<p class="rj-question">{escape(question.text)}</p></header>'
        f'<div class="rj-top"><figure>{"".join(map(definitions, names, views))}{pictures}</figure>'
        f'<div class="rj-answers"><table><thead><tr><th scope="col">run</th><th scope="col">answer</th>'
        f'<th scope="col">tokens a layer</th><th scope="col">KV bytes</th></tr></thead><tbody>{rows}'
        f'<tr class="rj-truth"><th scope="row">{truth_key}truth</th><td colspan="3">{escape(question.truth)}</td></tr>'
        f"</tbody></table>{notes}</div></div>{runs}</article>"
    )


def _answer(number: int, one: ShownAnswer) -> str:
    verdict = {True: "right", False: "wrong", None: ""}[one.right]
    sign = {"right": "\u2713 right", "wrong": "\u2717 wrong", "": ""}[verdict]
    chip = f'<span class="rj-verdict rj-{verdict}">{sign}</span>' if verdict else ""
    key = "" if one.box is None else _key(number)
    share = one.routed.average / max(one.routed.visual, 1)
    score = f' <span class="rj-score">{escape(one.score)}</span>' if one.score else ""
    said = f"<q>{escape(one.text)}</q>" if one.text else '<em class="rj-score">an empty answer</em>'
    return (
        f'<tr><th scope="row">{key}{escape(one.name)}</th><td>{said} {chip}{score}</td>'
        f'<td data-label="tokens a layer">{one.routed.average:.1f} <small>({share:.1%})</small></td>'
        f'<td data-label="KV bytes">{one.routed.kv_bytes:,}</td></tr>'
    )


def _key(number: int) -> str:
    """A sample of a box's line, with the mark at its corner."""
    colour, dashes, casing = BOX_STYLES[_style(number)]
    mark = str(number) if number else ""
    lines = "".join(
        f'<line class="{name}" x1="1" x2="27" y1="7" y2="7" {more}/>'
        for name, more in (
            ("rj-case", f'stroke="{casing}"'),
            ("rj-box", f'stroke="{colour}" stroke-dasharray="{dashes}"'),
        )
    )
    return (
        f'<svg class="rj-key" width="28" height="14" aria-hidden="true">{lines}</svg><span class="rj-no">{mark}</span>'
    )


def _style(number: int) -> int:
    return number and 1 + (number - 1) % (len(BOX_STYLES) - 1)


def _run(routed: Routed, name: str, views: Sequence[View], names: Sequence[str], boxes: Sequence[Box]) -> str:
    cost = (
        f"{routed.average:.1f} of {routed.visual} visual tokens a layer, {routed.kv_bytes:,} KV bytes after the prefill"
    )
    side = f"<h4>{escape(name)}</h4>{layer_bars(routed)}<p>{cost}</p>"
    if not views:
        stages = '<p class="rj-note">The prompt has no image.</p>'
    elif routed.plain:
        stages = f'<p class="rj-note">All {routed.visual} visual tokens run in every layer.</p>'
    else:
        stages = "".join(_stage(stage, views, names, boxes) for stage in routed.stages)
        stages = f'<div class="rj-stages">{stages}</div>'
    return f'<section class="rj-run"><div class="rj-side">{side}</div>{stages}</section>'


def _stage(stage: StageTokens, views: Sequence[View], names: Sequence[str], boxes: Sequence[Box]) -> str:
    edges = [0]
    for view in views:
        edges.append(edges[-1] + view.count)
    parts = [stage.part(slice(lo, hi)) for lo, hi in pairwise(edges)]
    maps = "".join(
        token_map(name, view, part, [] if place else boxes)
        for place, (name, view, part) in enumerate(zip(names, views, parts, strict=True))
    )
    caption = f"<b>{layers(stage)}</b> {int(stage.running.sum())} of {len(stage.states)} run"
    return f"<figure>{maps}<figcaption>{caption}</figcaption></figure>"


def layer_bars(routed: Routed) -> str:
    """Tokens of each decoder layer: visual ones that run, on top of the text."""
    width, height, base = 232, 66, 52
    visual, tokens = per_layer(routed.stages), routed.kv_tokens
    # The same scale for every run of a prompt: that of all its tokens.
    scale = (base - 10) / (routed.visual + tokens[-1] - visual[-1])
    step = width / len(visual)

    def bars() -> Iterator[str]:
        for layer, (seen, cached) in enumerate(zip(visual, tokens, strict=True)):
            text, x = cached - seen, layer * step
            tall, low = seen * scale, text * scale
            yield f"<g><title>layer {layer}: {seen} visual and {text} text tokens</title>"
            yield f'<rect class="rj-full" x="{x:.2f}" y="10" width="{0.8 * step:.2f}" height="{base - 10}"/>'
            yield (
                f'<rect class="rj-visual" x="{x:.2f}" y="{base - low - tall:.2f}" width="{0.8 * step:.2f}" '
                f'height="{tall:.2f}"/>'
            )
            yield (
                f'<rect class="rj-text" x="{x:.2f}" y="{base - low:.2f}" width="{0.8 * step:.2f}" '
                f'height="{low:.2f}"/></g>'
            )

    axis = (
        f'<text x="0" y="{height - 2}">layer 0</text>'
        f'<text x="{width}" y="{height - 2}" text-anchor="end">{len(visual) - 1}</text>'
        f'<text x="{width / 2}" y="{height - 2}" text-anchor="middle">'
        '<tspan class="rj-visual">\u25a0</tspan> visual <tspan class="rj-text">\u25a0</tspan> text</text>'
    )
    return (
        f'<svg class="rj-bars" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="tokens of each layer, from {max(tokens)} to {min(tokens)}">{"".join(bars())}{axis}</svg>'
    )


def _names(views: Sequence[View], salt: str) -> list[str]:
    """Ids that differ between the figures of a document."""
    return [
        f"rj-{hashlib.sha256(salt.encode() + view.pixels.tobytes()).hexdigest()[:10]}-{place}"
        for place, view in enumerate(views)
    ]
