"""Rows of a tiny Qwen model with images of different sizes, and the eager torch reference's run of each by itself."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from convert.crosscheck.reference import Reference, run
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.prior import prior_scores
from tests.tiny_qwen import random_ids, random_patches


@dataclass(frozen=True, eq=False)
class RaggedPrompts:
    """pair: (torch model, ours). grids: of each row's images. new: tokens that the reference generates."""

    pair: Callable[[], tuple]
    grids: tuple[tuple[tuple[int, int], ...], ...]
    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    new: int

    @cached_property
    def ids(self) -> list[np.ndarray]:
        sizes = zip(self.lengths, self.grids, self.starts, strict=True)
        return [random_ids(size, grids, start=start, seed=size) for size, grids, start in sizes]

    @cached_property
    def pixels(self) -> list[tuple]:
        """(patches, image_grid_thw) of each row."""
        return [
            random_patches(grids, seed=length) if grids else (None, None)
            for length, grids in zip(self.lengths, self.grids, strict=True)
        ]

    def batch(self, rows: Sequence[int]) -> dict:
        """Inputs as the HF processor gives them."""
        ids, mask = padded([self.ids[row] for row in rows])
        found = [self.pixels[row] for row in rows if self.grids[row]]
        pixels, thw = (np.concatenate(part) for part in zip(*found, strict=True)) if found else (None, None)
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_grid_thw": thw}

    def check(self, result, place: int, row: int, schedule: Schedule) -> None:
        """Row `place` of a traced prefill is the reference's run of `row`: selections, scores, anchors, cached rows and
        logits (fp32: 1e-5 of a score, 1e-4 of a logit)."""
        wanted = reference(self, schedule, row)
        np.testing.assert_allclose(result.logits[place], wanted.logits, atol=1e-4)
        np.testing.assert_array_equal(result.trace.kv_tokens[place], [len(ran) for ran in wanted.ran])
        if wanted.anchors is not None:
            found = result.trace.anchors[place]
            np.testing.assert_array_equal(found[found >= 0], wanted.anchors)
        count = sum(rows * cols for rows, cols in self.grids[row])
        assert len(wanted.decisions) == (len(result.trace.selected) if count else 0)
        for number, selected in enumerate(result.trace.selected):
            decision = wanted.decisions[number] if count else None
            np.testing.assert_array_equal(selected[place][selected[place] >= 0], decision.selected if decision else [])
            scores = result.trace.scores[number][place]
            assert not np.isfinite(scores[count:]).any()
            if decision:
                np.testing.assert_allclose(scores[:count], decision.scores, atol=1e-5, rtol=1e-5)


def padded(rows: Sequence[np.ndarray], filler: int = 9, left: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask; padding slots hold an id that must not matter."""
    width = max(map(len, rows))
    ids, mask = np.full((len(rows), width), filler), np.zeros((len(rows), width), int)
    for number, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(len(row))
        ids[number, where], mask[number, where] = row, 1
    return ids, mask


@cache
def reference(rows: RaggedPrompts, schedule: Schedule, row: int) -> Reference:
    """The reference's run of one row by itself."""
    ids, grids = rows.ids[row], rows.grids[row]
    prior = None
    if schedule.prior is not None and grids:
        prior = prior_scores(schedule, grids, zlib.crc32(ids.astype(np.int64).tobytes()))
    pixels, thw = rows.pixels[row]
    return run(rows.pair()[0], ids, pixels, schedule, image_grid_thw=thw, prior=prior, max_new_tokens=rows.new)
