"""A page of runs: accuracy against the budget, the questions with their answers and filters, and pictures of some.

The page is one file. Its script only hides, sorts and tells about what is there; without it everything is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import takewhile

from evals.harness.finished_runs import Finished
from evals.harness.routes import FULL
from evals.harness.runner import Record
from reroute_jax.figure.card import STYLE, ShownQuestion, card
from reroute_jax.figure.maps import BLUE, GREEN, ORANGE, PURPLE, STATES, VERMILION, legend

LISTED = 400  # questions of a board that the page lists, those that tell most first
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE)
RIGHT, WRONG, UNKNOWN = "1", "0", "-"


@dataclass(frozen=True)
class Point:
    """A run in the chart. series: runs that one line joins. share: visual tokens a layer, in percent of all."""

    run: str
    series: str
    share: float
    score: float
    kept: str
    kv_bytes: float


@dataclass(frozen=True)
class PageQuestion:
    """A question as the list has it. verdicts: a character a run, RIGHT, WRONG or UNKNOWN."""

    number: int
    text: str
    truth: str
    answers: tuple[str, ...]
    verdicts: str


@dataclass(frozen=True)
class Board:
    """A model on a task. pairs: of run names, the first of which is held against the second. cards: by number."""

    title: str
    metric: str
    points: tuple[Point, ...]
    runs: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    asked: tuple[PageQuestion, ...]
    cards: Mapping[int, ShownQuestion]
    note: str = ""

    def ordered(self) -> list[PageQuestion]:
        """What the first of the filters shows comes first."""
        kinds = [RIGHT + WRONG, WRONG + RIGHT, WRONG + WRONG, RIGHT + RIGHT]

        def place(asked: PageQuestion) -> tuple[int, int]:
            kind = "".join(asked.verdicts[self.runs.index(run)] for run in self.pairs[0]) if self.pairs else ""
            return kinds.index(kind) if kind in kinds else len(kinds), asked.number

        return sorted(self.asked, key=place)


def is_right(record: Record, metric: str) -> bool | None:
    """Whether an answer counts by itself; None where only several together do."""
    if "correct" in record:
        return bool(record["correct"])
    value = record["metrics"].get(metric)
    return None if value is None else value >= 0.5


def board(finished: Finished, metric: str, scale: int, cards: Mapping[int, ShownQuestion], note: str = "") -> Board:
    """Of a finished run. scale: what scores are shown times."""
    settings, runs = finished.settings, finished.summary["runs"]
    points = tuple(_point(name, values, metric, scale) for name, values in runs.items())
    records = list(zip(*finished.records.values(), strict=True))
    texts = own_parts([row[0].get("prompt", "") for row in records])
    asked = tuple(
        PageQuestion(
            row[0]["doc_id"],
            text,
            shown_truth(row[0].get("truth", row[0].get("why", ""))),
            tuple(record.get("text", "") for record in row),
            "".join({True: RIGHT, False: WRONG, None: UNKNOWN}[is_right(record, metric)] for record in row),
        )
        for row, text in zip(records, texts, strict=True)
    )
    title = f"{settings['task']}, {settings['model']}"
    about = f"{finished.summary['questions']} questions of {settings['data']}. {note}".strip()
    return Board(title, metric, points, tuple(runs), tuple(finished.pairs), asked, cards, about)


def _point(name: str, values: Mapping, metric: str, scale: int) -> Point:
    cost, kept = values["cost"], values.get("retention_percent", {}).get(metric)
    text = ""
    if kept is not None and kept["value"] is not None:
        bounds = "" if kept["low"] is None else f" ({kept['low']:.1f} to {kept['high']:.1f})"
        text = f"{kept['value']:.1f}{bounds}"
    series = cost["label"].rsplit(" ", 1)[0]
    return Point(name, series, 100 * cost["realised_budget"], scale * values["metrics"][metric], text, cost["kv_bytes"])


def shown_truth(truth: object) -> str:
    if isinstance(truth, list | tuple) and all(isinstance(value, float) for value in truth):
        return f"[{', '.join(f'{value:.2f}' for value in truth)}]"
    return " / ".join(dict.fromkeys(map(str, truth))) if isinstance(truth, list | tuple) else str(truth)


def own_parts(prompts: Sequence[str]) -> list[str]:
    """The prompts without the words that all of them begin and end with."""
    words = [prompt.split(" ") for prompt in prompts]
    first = _shared(words)
    last = _shared([line[first:][::-1] for line in words])
    own = [" ".join(line[first : len(line) - last]) for line in words]
    return own if all(own) else list(prompts)


def _shared(lines: Sequence[Sequence[str]]) -> int:
    """How many words all of the lines begin with."""
    return len(list(takewhile(lambda words: len(set(words)) == 1, zip(*lines, strict=False))))


def page(title: str, boards: Sequence[Board]) -> str:
    """The whole document."""
    own = files("evals.harness")
    style = STYLE + own.joinpath("page.css").read_text(encoding="utf-8")
    script = own.joinpath("page.js").read_text(encoding="utf-8")
    pictured = any(one.cards for one in boards)
    view = (
        '<fieldset class="pg-view"><legend>maps show</legend>'
        '<label><input type="radio" name="view" value="tokens" checked> tokens</label>'
        '<label><input type="radio" name="view" value="scores"> scores</label></fieldset>'
    )
    key = f'<div class="rj pg-key">{legend("rj-legend")}{view}</div>' if pictured else ""
    body = "".join(_board(number, one) for number, one in enumerate(boards))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f'<body class="rj"><main><h1>{escape(title)}</h1>{key}{body}</main>'
        f'<div id="pg-tip" role="status" hidden></div><script>const STATES = {list(STATES)};{script}</script>'
        "</body></html>\n"
    )


def _board(number: int, one: Board) -> str:
    ordered = one.ordered()
    left = max(len(ordered) - LISTED, 0)
    cards = "".join(
        card(one.cards[asked.number], f'id="q{number}-{asked.number}" data-verdicts="{asked.verdicts}"')
        for asked in ordered
        if asked.number in one.cards
    )
    more = f'<p class="rj-note">{left} more questions are in the run folder.</p>' if left else ""
    listed = "".join(_row(number, asked, one) for asked in ordered[:LISTED])
    heads = "".join(f'<th scope="col" data-run="{place}">{escape(run)}</th>' for place, run in enumerate(one.runs))
    pictures = f'<h3>Pictures</h3><div class="pg-list pg-cards">{cards}</div>' if cards else ""
    return (
        f'<section class="pg-board" data-full="{_place(one, FULL)}"><h2>{escape(one.title)}</h2>'
        f'<p class="rj-note">{escape(one.note)}</p>'
        f'<div class="pg-summary">{chart(one.points, one.metric)}{_scores(one)}</div>{_filters(one)}{pictures}'
        f'<details class="pg-all" {"" if cards else "open"}><summary>All questions</summary><div class="pg-scroll">'
        f'<table><thead><tr><th scope="col">no.</th><th scope="col">question</th><th scope="col">truth</th>{heads}</tr>'
        f'</thead><tbody class="pg-list">{listed}</tbody></table></div>{more}</details></section>'
    )


def _place(one: Board, run: str) -> int:
    return one.runs.index(run) if run in one.runs else -1


def _row(board_number: int, asked: PageQuestion, one: Board) -> str:
    number = str(asked.number)
    if asked.number in one.cards:
        number = f'<a href="#q{board_number}-{asked.number}">{number}</a>'
    cells = "".join(
        f'<td data-run="{place}" class="{ {RIGHT: "rj-right", WRONG: "rj-wrong"}.get(verdict, "") }">'
        f"{ {RIGHT: '✓ ', WRONG: '✗ '}.get(verdict, '') }{escape(answer)}</td>"
        for place, (answer, verdict) in enumerate(zip(asked.answers, asked.verdicts, strict=True))
    )
    return (
        f'<tr data-verdicts="{asked.verdicts}" data-number="{asked.number}"><td>{number}</td>'
        f"<td>{escape(asked.text)}</td><td>{escape(asked.truth)}</td>{cells}</tr>"
    )


def _filters(one: Board) -> str:
    """Pairs to choose from, and what to show of the questions; the script counts them."""
    if not one.pairs:
        return ""
    options = "".join(
        f'<option value="{one.runs.index(first)},{one.runs.index(second)}" data-first="{escape(short(first))}" '
        f'data-second="{escape(short(second))}">{escape(first)} against {escape(second)}</option>'
        for first, second in one.pairs
    )
    kinds = (RIGHT + WRONG, WRONG + RIGHT, WRONG + WRONG, RIGHT + RIGHT, "")
    first, second = map(short, one.pairs[0])
    buttons = "".join(
        f'<button type="button" data-kind="{kind}" aria-pressed="{"false" if kind else "true"}">'
        f"{escape(_kind_name(kind, first, second))} <span></span></button>"
        for kind in kinds
    )
    choice = f'<label class="pg-pair">compare <select>{options}</select></label>'
    return f'<div class="pg-filters">{choice}<div role="group" aria-label="questions to show">{buttons}</div></div>'


def _kind_name(kind: str, first: str, second: str) -> str:
    return {
        RIGHT + WRONG: f"{first} right and {second} wrong",
        WRONG + RIGHT: f"{first} wrong and {second} right",
        WRONG + WRONG: "both wrong",
        RIGHT + RIGHT: "both right",
        "": "all",
    }[kind]


def short(run: str) -> str:
    """What a filter calls a run."""
    if run == FULL:
        return "all tokens"
    return next((name for part, name in (("reroute", "reroute"), ("delete", "deletion")) if part in run), run)


def _scores(one: Board) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(point.run)}</th><td>{point.share:.1f} %</td><td>{point.score:.1f}</td>'
        f"<td>{escape(point.kept)}</td><td>{point.kv_bytes:,.0f}</td></tr>"
        for point in one.points
    )
    return (
        '<div class="pg-scroll"><table class="pg-scores"><thead><tr><th scope="col">run</th>'
        f'<th scope="col">tokens a layer</th><th scope="col">{escape(one.metric)}</th>'
        f'<th scope="col">% of all tokens\' score (95%)</th><th scope="col">KV bytes</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def chart(points: Sequence[Point], metric: str) -> str:
    """Score against the realised budget: a line for each series, the score with all tokens as a level."""
    width, height, left, right, top, bottom = 520, 300, 46, 14, 14, 40
    routed = [point for point in points if point.run != FULL]
    most_share = 1.15 * max((point.share for point in routed), default=100.0)
    most = max(1.08 * max(point.score for point in points), 1e-9)

    def x(share: float) -> float:
        return left + (width - left - right) * share / most_share

    def y(score: float) -> float:
        return height - bottom - (height - top - bottom) * score / most

    series: dict[str, list[Point]] = {}
    for point in routed:
        series.setdefault(point.series, []).append(point)
    methods = list(dict.fromkeys(name.split(" ")[0] for name in series))
    lines, keys = "", ""
    for name, found in series.items():
        colour, deletes = COLOURS[methods.index(name.split(" ")[0]) % len(COLOURS)], "delete" in name
        found = sorted(found, key=lambda point: point.share)
        path = " ".join(f"{x(point.share):.1f},{y(point.score):.1f}" for point in found)
        dash = "6 4" if deletes else ""
        lines += f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
        lines += "".join(
            f'<g class="pg-point"><title>{escape(point.run)}: {point.score:.1f} at {point.share:.1f} %</title>'
            f"{_marker(x(point.share), y(point.score), colour, deletes)}</g>"
            for point in found
        )
        keys += (
            f'<li><svg width="34" height="14" aria-hidden="true"><line x1="1" x2="33" y1="7" y2="7" '
            f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>{_marker(17, 7, colour, deletes)}</svg>'
            f"{escape(name)}</li>"
        )
    level = "".join(
        f'<line class="pg-level" x1="{left}" x2="{width - right}" y1="{y(point.score):.1f}" y2="{y(point.score):.1f}"/>'
        f'<text x="{width - right}" y="{y(point.score) - 5:.1f}" text-anchor="end">all tokens {point.score:.1f}</text>'
        for point in points
        if point.run == FULL
    )
    step_x, step_y = _step(most_share), _step(most)
    ticks = "".join(
        f'<text x="{x(step_x * n):.1f}" y="{height - bottom + 17}" text-anchor="middle">{step_x * n:g}</text>'
        for n in range(int(most_share / step_x) + 1)
    ) + "".join(
        f'<line class="pg-grid" x1="{left}" x2="{width - right}" y1="{y(step_y * n):.1f}" y2="{y(step_y * n):.1f}"/>'
        f'<text x="{left - 7}" y="{y(step_y * n) + 4:.1f}" text-anchor="end">{step_y * n:g}</text>'
        for n in range(int(most / step_y) + 1)
    )
    axis = (
        f'<text x="{(left + width) / 2}" y="{height - 5}" text-anchor="middle">visual tokens a layer, % of all</text>'
    )
    return (
        f'<figure class="pg-chart"><figcaption>{escape(metric)} against budget</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(metric)} against the share of visual '
        f'tokens; the table beside it has the numbers">{ticks}{level}{lines}{axis}</svg>'
        f'<ul class="pg-keys">{keys}</ul></figure>'
    )


def _marker(x: float, y: float, colour: str, deletes: bool) -> str:
    if deletes:
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}"/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>'


def _step(most: float) -> float:
    """Between the ticks of an axis up to `most`: at most eight of 1, 2, 5, 10, ..."""
    power = 10.0**-3
    while True:
        for factor in (1, 2, 5):
            if most / (factor * power) <= 8:
                return factor * power
        power *= 10
