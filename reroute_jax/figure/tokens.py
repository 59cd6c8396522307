"""What each visual token did in each stage, and where it stands in the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from reroute_jax.routing.plan import Schedule
from reroute_jax.types import Grid, Size

STATES = ("run", "returned", "deferred", "deleted", "merged")
RUN, RETURNED, DEFERRED, DELETED, MERGED = range(len(STATES))


@dataclass(frozen=True)
class StageTokens:
    """Decoder layers [lo, hi). states: of each visual token, an index of STATES; "returned" runs, too.

    scores: what the stage's decision ranked by, -inf where a token was not a candidate; None without a decision.
    """

    lo: int
    hi: int
    states: Int[np.ndarray, " V"]
    scores: Float[np.ndarray, " V"] | None

    @property
    def running(self) -> Bool[np.ndarray, " V"]:
        return self.states <= RETURNED

    def part(self, tokens: slice) -> StageTokens:
        """Of some of the tokens, such as those of one image."""
        return StageTokens(self.lo, self.hi, self.states[tokens], None if self.scores is None else self.scores[tokens])


def stage_tokens(
    schedule: Schedule,
    sizes: Sequence[int],
    selected: Sequence[Int[np.ndarray, " _"]],
    scores: Sequence[Float[np.ndarray, " n"]],
    anchors: Int[np.ndarray, " _"] | None,
) -> list[StageTokens]:
    """The stages of one row, whose images have `sizes` visual tokens; the rest as a Trace has it for this row."""
    count = sum(sizes)
    present = np.ones(count, bool) if anchors is None else _mask(anchors, count)
    candidates = present.copy()
    if schedule.first_image_only and sizes:
        candidates[sizes[0] :] = False
    states, stages = np.where(present, RUN, MERGED), []
    found = iter(zip(selected, scores, strict=True) if count else ())
    for stage in schedule.stages:
        seen = None
        if stage.decides and count:
            chosen, seen = next(found)
            chosen, seen = _mask(chosen, count), np.asarray(seen[:count], np.float64)
            back = chosen & (states > RETURNED)
            states = np.where(candidates, DELETED if stage.action == "delete" else DEFERRED, states)
            states = np.where(chosen, np.where(back, RETURNED, RUN), states)
            candidates = chosen if stage.action == "delete" else candidates
        stages.append(StageTokens(stage.lo, stage.hi, states, seen))
    return stages


def per_layer(stages: Sequence[StageTokens]) -> list[int]:
    """Visual tokens that run in each decoder layer."""
    return [int(stage.running.sum()) for stage in stages for _ in range(stage.lo, stage.hi)]


def cell(token: int, grid: Grid, size: Size) -> tuple[float, float, float, float]:
    """(x, y, width, height) of a visual token in the image of `size` pixels that the model sees, tokens by rows."""
    rows, cols = grid
    width, height = size[0] / cols, size[1] / rows
    return token % cols * width, token // cols * height, width, height


def strips(chosen: Bool[np.ndarray, " V"], grid: Grid) -> Iterator[tuple[int, int]]:
    """(first token, tokens) of every unbroken run of chosen tokens within a row of the grid."""
    rows, cols = grid
    edges = np.diff(np.pad(chosen.reshape(rows, cols), ((0, 0), (1, 1))).astype(np.int8), axis=1)
    for row in range(rows):
        starts, ends = np.flatnonzero(edges[row] == 1), np.flatnonzero(edges[row] == -1)
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            yield row * cols + start, end - start


def ranks(scores: Float[np.ndarray, " V"]) -> Int[np.ndarray, " V"]:
    """From 1 for the best on, the earlier of equals first; 0 where a token was not a candidate."""
    order = np.argsort(-scores, kind="stable")
    place = np.empty(len(scores), int)
    place[order] = np.arange(1, len(scores) + 1)
    return np.where(np.isneginf(scores), 0, place)


def _mask(indices: Int[np.ndarray, " _"], count: int) -> Bool[np.ndarray, " V"]:
    mask = np.zeros(count, bool)
    mask[indices[indices >= 0]] = True
    return mask
