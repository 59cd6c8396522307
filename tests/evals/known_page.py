"""A page whose every pixel is known: each visual token of its picture has a colour of its own."""

from __future__ import annotations

import numpy as np

from evals.harness.pages import Board, PageQuestion, Point, page
from reroute_jax.figure.card import Routed, ShownAnswer, ShownQuestion
from reroute_jax.figure.maps import View
from reroute_jax.figure.tokens import stage_tokens
from reroute_jax.routing.plan import Schedule

ROWS, COLS, SIDE = 4, 6, 28
TOKENS = ROWS * COLS
# Tokens that each decision keeps.
FIRST, SECOND = (0, 1, 7, 8, 13, 20, 21, 22), (1, 5, 8, 23)
SECOND_DELETED = (1, 8, 13, 22)
VERDICTS = ("101", "111", "110", "100", "101")  # all tokens, deletion, reroute
RUNS = ("full", "pdrop-delete-64", "pdrop-reroute-64")


def colours() -> np.ndarray:
    """Warm ones, `[tokens, 3]`: none is near the blue, black and orange of the veils."""
    steps = np.arange(TOKENS)
    return np.stack([150 + 4 * steps, 90 + 3 * steps[::-1], np.full(TOKENS, 90)], axis=1).astype(np.uint8)


def view() -> View:
    cells = colours().reshape(ROWS, COLS, 3)
    return View(np.kron(cells, np.ones((SIDE, SIDE, 1), np.uint8)), (ROWS, COLS))


def routed(action: str | None, second: tuple[int, ...] = SECOND) -> Routed:
    if action is None:
        schedule, selected = Schedule.from_decisions((), (), 6), []
    else:
        schedule = Schedule.from_decisions((1, 3), (0.4, 0.2), 6, action)
        selected = [np.array(FIRST), np.array(second)]
    scores = [np.linspace(0, 1, TOKENS)] * len(selected)
    stages = stage_tokens(schedule, [TOKENS], selected, scores, None)
    kv_tokens = tuple(int(stage.running.sum()) + 9 for stage in stages for _ in range(stage.lo, stage.hi))
    return Routed(action or "none", tuple(stages), kv_tokens, 128 * sum(kv_tokens))


def question(number: int) -> ShownQuestion:
    box = (0.5, 0.25, 1.0, 0.75)
    rights = [verdict == "1" for verdict in VERDICTS[number]]
    runs = (None, "delete", "reroute")
    answers = tuple(
        ShownAnswer(
            name,
            f"answer {number} of {name}",
            right,
            "IoU 0.61",
            box,
            routed(action, SECOND_DELETED if action == "delete" else SECOND),
        )
        for name, right, action in zip(RUNS, rights, runs, strict=True)
    )
    return ShownQuestion(f"question {number}", f"the thing number {number}", "[0.50, 0.25]", box, (view(),), answers)


def known_page() -> str:
    """Five questions, three of them with pictures."""
    points = (
        Point("full", "none", 100.0, 90.0, "", 1000.0),
        Point("pdrop-delete-64", "pdrop delete", 12.0, 41.0, "45.6 (40.0 to 50.0)", 300.0),
        Point("pdrop-reroute-64", "pdrop reroute", 12.5, 63.0, "70.0 (65.0 to 75.0)", 310.0),
        Point("pdrop-delete-128", "pdrop delete", 22.0, 60.0, "66.7", 400.0),
        Point("pdrop-reroute-128", "pdrop reroute", 22.5, 78.0, "86.7", 410.0),
    )
    asked = tuple(
        PageQuestion(
            number, f"the thing number {number}", "truth", tuple(f"answer {number} of {run}" for run in RUNS), verdicts
        )
        for number, verdicts in enumerate(VERDICTS)
    )
    cards = {number: question(number) for number in (0, 1, 2)}
    pairs = ((RUNS[2], RUNS[1]), (RUNS[2], RUNS[0]))
    return page(
        "A known page", [Board("refcoco, known", "accuracy", points, RUNS, pairs, asked, cards, "Five questions.")]
    )
