"""What a trace says of each token, and where the token is drawn."""

import numpy as np
import pytest

from reroute_jax.figure.tokens import (
    DEFERRED,
    DELETED,
    MERGED,
    RETURNED,
    RUN,
    cell,
    per_layer,
    ranks,
    stage_tokens,
    strips,
)
from reroute_jax.routing.plan import Schedule

SELECTED = [np.array([0, 2, 5, -1]), np.array([2, 3])]
SCORES = [np.linspace(0, 1, 6, dtype=np.float32)] * 2


def states(action: str, **more) -> list[list[int]]:
    schedule = Schedule.from_decisions((1, 3), (0.5, 0.4), 4, action)
    return [stage.states.tolist() for stage in stage_tokens(schedule, [6], SELECTED, SCORES, more.get("anchors"))]


def test_reroute_defers_and_returns():
    stages = states("reroute")
    assert stages[0] == [RUN] * 6
    assert stages[1] == [RUN, DEFERRED, RUN, DEFERRED, DEFERRED, RUN]
    assert stages[2] == [DEFERRED, DEFERRED, RUN, RETURNED, DEFERRED, DEFERRED]


def test_deletion_deletes():
    schedule = Schedule.from_decisions((1, 3), (0.5, 0.2), 4, "delete")
    stages = stage_tokens(schedule, [6], [np.array([0, 2, 5]), np.array([2])], SCORES, None)
    assert stages[1].states.tolist() == [RUN, DELETED, RUN, DELETED, DELETED, RUN]
    assert stages[2].states.tolist() == [DELETED, DELETED, RUN, DELETED, DELETED, DELETED]
    assert per_layer(stages) == [6, 3, 3, 1]


def test_merged_tokens_stay_merged():
    stages = states("reroute", anchors=np.array([0, 2, 3, 5]))
    assert stages[0] == [RUN, MERGED, RUN, RUN, MERGED, RUN]
    assert stages[1] == [RUN, MERGED, RUN, DEFERRED, MERGED, RUN]
    assert stages[2] == [DEFERRED, MERGED, RUN, RETURNED, MERGED, DEFERRED]


def test_images_behind_the_first_run_like_text():
    schedule = Schedule.from_decisions((1,), (0.5,), 2, "delete", first_image_only=True)
    stages = stage_tokens(schedule, [4, 2], [np.array([1, 3])], SCORES, None)
    assert stages[1].states.tolist() == [DELETED, RUN, DELETED, RUN, RUN, RUN]


def test_a_prompt_without_an_image_has_stages_without_tokens():
    stages = stage_tokens(Schedule.from_decisions((1,), (0.5,), 2), [], [], [], None)
    assert [len(stage.states) for stage in stages] == [0, 0]


@pytest.mark.parametrize(
    ("token", "grid", "size", "expected"),
    [
        (0, (24, 24), (336, 336), (0, 0, 14, 14)),
        (25, (24, 24), (336, 336), (14, 14, 14, 14)),
        (30, (10, 30), (840, 280), (0, 28, 28, 28)),
        (29, (10, 30), (840, 280), (812, 0, 28, 28)),
    ],
)
def test_tokens_stand_by_rows(token, grid, size, expected):
    assert cell(token, grid, size) == expected


def test_strips_do_not_run_over_the_edge():
    chosen = np.array([1, 1, 0, 1, 1, 0, 1, 1, 1], bool)
    assert list(strips(chosen, (3, 3))) == [(0, 2), (3, 2), (6, 3)]


def test_the_earlier_of_equal_scores_ranks_first():
    assert ranks(np.array([0.5, -np.inf, 0.9, 0.5])).tolist() == [2, 0, 1, 3]
