"""What a prefill selected, and a picture of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from reroute_jax.config import ModelConfig
from reroute_jax.decoder import Prefilled
from reroute_jax.engine.batching import Batch
from reroute_jax.errors import RerouteError
from reroute_jax.figure.card import Figure, Routed, routed_figure
from reroute_jax.figure.maps import View
from reroute_jax.figure.tokens import StageTokens, stage_tokens
from reroute_jax.nn.cache import token_bytes
from reroute_jax.routing.plan import Schedule
from reroute_jax.types import Grid


@dataclass(frozen=True)
class Seen:
    """What a prefill was given, for pictures of it.

    grids: of every row's images. open_images: gives all of them as the model sees them, uint8 `[h, w, 3]`. dtype: of
    the cache.
    """

    schedule: Schedule
    grids: tuple[tuple[Grid, ...], ...]
    open_images: Callable[[], list[np.ndarray]]
    config: ModelConfig
    dtype: str

    def views(self, row: int) -> list[View]:
        """The images of a row as the model sees them."""
        before, grids = sum(map(len, self.grids[:row])), self.grids[row]
        images = self.open_images()[before : before + len(grids)] if grids else []
        return [View(image, grid) for image, grid in zip(images, grids, strict=True)]

    def of_row(self, row: int) -> Seen:
        """The same for one row alone; it holds no other's images."""
        images = [view.pixels for view in self.views(row)]
        return replace(self, grids=(self.grids[row],), open_images=lambda: images)


@dataclass(frozen=True)
class Trace:
    """What was selected. Indices count a row's original visual tokens (before any merge), ascending, -1 padded.

    selected: per decision `[B, k]`. scores: per decision fp32 `[B, n]`, -inf where a token was not a candidate.
    anchors: `[B, N1]`, tokens that a merge kept, a cell by its centre, or None. kv_tokens: `[B, L]`, keys cached per
    layer. seen: what the prompts were. find_members: gives `members`.
    """

    selected: tuple[np.ndarray, ...]
    scores: tuple[np.ndarray, ...]
    anchors: np.ndarray | None
    kv_tokens: np.ndarray
    seen: Seen
    find_members: Callable[[], np.ndarray | None] = lambda: None

    @cached_property
    def members(self) -> np.ndarray | None:
        """`[B, N1, M]`, the tokens that each of `anchors` was made of, itself among them; None without a merge. They
        are found where they are first asked for, by another run of the tower."""
        return self.find_members()

    @classmethod
    def of(cls, batch: Batch, found: Prefilled, anchors, config: ModelConfig, dtype: str, open_images, merged) -> Trace:
        """Of the live rows of a batch. anchors: as of `features.image_features`. dtype, open_images: as of `Seen`.
        merged: as `programs.members`, of the batch's images."""
        live = len(batch.layouts)
        grids = tuple(layout.question.grids for layout in batch.layouts)
        return cls(
            selected=tuple(_indices(np.asarray(decision.selected)[:live]) for decision in found.decisions),
            scores=tuple(np.asarray(decision.scores)[:live] for decision in found.decisions),
            anchors=None if batch.schedule.merge is None else _kept(batch, np.asarray(anchors))[:live],
            kv_tokens=np.asarray(found.cache.tokens_per_layer())[:live],
            seen=Seen(batch.schedule, grids, open_images, config, dtype),
            find_members=lambda: None if batch.schedule.merge is None else _members(batch, np.asarray(anchors), merged),
        )

    def of_row(self, row: int) -> Trace:
        """The same for one row alone."""
        return Trace(
            selected=tuple(_trimmed(found[row]) for found in self.selected),
            scores=tuple(found[row : row + 1] for found in self.scores),
            anchors=None if self.anchors is None else _trimmed(self.anchors[row]),
            kv_tokens=self.kv_tokens[row : row + 1],
            seen=self.seen.of_row(row),
            find_members=lambda: None if self.anchors is None else self._members_of(row),
        )

    def _members_of(self, row: int) -> np.ndarray:
        own = self.members[row : row + 1, self.anchors[row] >= 0]
        return own[..., : int((own >= 0).sum(axis=2).max(initial=0))]

    def stages(self, row: int = 0) -> list[StageTokens]:
        """What every visual token of a row did in each stage."""
        sizes = [rows * cols for rows, cols in self.seen.grids[row]]
        of_row = [[one[row] for one in found] for found in (self.selected, self.scores)]
        return stage_tokens(self.seen.schedule, sizes, *of_row, None if self.anchors is None else self.anchors[row])

    def routed(self, row: int = 0) -> Routed:
        """A row's stages with what they cost, for a picture."""
        label, tokens = self.seen.schedule.label, self.kv_tokens[row].tolist()
        each = token_bytes(self.seen.config.decoder, self.seen.dtype)
        return Routed(label, tuple(self.stages(row)), tuple(tokens), each * sum(tokens))

    def show(self, row: int = 0) -> Figure:
        """A picture of one row, which a notebook displays: its images with the tokens of every stage shaded by what
        they did, the scores on hover, tokens a layer and KV bytes.

        Raises RerouteError for a row that is not there, and for arrays of a checkpoint without its image processor.
        """
        if not 0 <= row < len(self.seen.grids):
            raise RerouteError(f"there is no row {row}: expected 0 to {len(self.seen.grids) - 1}")
        return routed_figure(self.seen.views(row), self.routed(row))


def _kept(batch: Batch, anchors: np.ndarray) -> np.ndarray:
    """Indices of the tokens that a merge kept of each row."""
    prompt = batch.prompt
    of_slot = np.take_along_axis(anchors, np.maximum(prompt.feature, 0), axis=1)
    kept = np.zeros(prompt.visual_positions.shape[-2:], bool)
    row, slot = np.nonzero(prompt.feature >= 0)
    kept[row, of_slot[row, slot]] = True
    return _indices(kept)


def _members(batch: Batch, anchors: np.ndarray, merged: Callable[[], Any]) -> np.ndarray:
    """Indices of the tokens that each one left of each row was made of, in the order of these."""
    if batch.images is None:
        return np.zeros((len(batch.layouts), 0, 0), np.int32)
    found, prompt, rows = np.asarray(merged()), batch.prompt, []
    found = found.reshape(*batch.images.first.shape, *found.shape[1:])
    for row in range(len(batch.layouts)):
        features = prompt.feature[row][prompt.feature[row] >= 0]
        _, order = np.unique(anchors[row, features], return_index=True)
        image, within = np.divmod(features[order], found.shape[2])
        made_of = zip(batch.images.first[row, image], found[row, image, within], strict=True)
        rows.append([start + np.flatnonzero(mask) for start, mask in made_of])
    most = max((len(one) for row in rows for one in row), default=0)
    members = np.full((len(rows), max(map(len, rows)), most), -1, np.int32)
    for row, own in enumerate(rows):
        for number, one in enumerate(own):
            members[row, number, : len(one)] = one
    return members


def _indices(mask: np.ndarray) -> np.ndarray:
    """Columns that are set in each row, ascending, -1 padded to the longest."""
    found = [np.flatnonzero(row) for row in mask]
    width = max((len(row) for row in found), default=0)
    return np.array([np.pad(row, (0, width - len(row)), constant_values=-1) for row in found], np.int32)


def _trimmed(indices: np.ndarray) -> np.ndarray:
    """`[1, k]` without the padding behind."""
    return indices[indices >= 0][None]
