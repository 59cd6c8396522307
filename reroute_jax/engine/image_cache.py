"""One image, many questions: what prompts have in common up to their last image runs once and is kept (`prefix.py`)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from reroute_jax.buckets import TEXT_BUCKETS, bucket
from reroute_jax.decoder import Prefilled
from reroute_jax.engine import programs
from reroute_jax.engine.batching import Batch, Layout, Question
from reroute_jax.engine.groups import batch_of, padded_rows
from reroute_jax.engine.pipeline import full_groups
from reroute_jax.engine.recent import Recent
from reroute_jax.engine.running import prefill_ahead, run_prefill
from reroute_jax.engine.side_files import SideFiles
from reroute_jax.errors import RerouteError
from reroute_jax.nn.sharding import mesh_of
from reroute_jax.nn.weights import Weights
from reroute_jax.prefix import Opening, PrefixStates
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.stages import Stage


@dataclass(frozen=True)
class Prefix:
    """Of one prompt. index: of each visual slot, the token that it stands for among the prompt's original ones; -1 for
    text."""

    states: PrefixStates
    index: Int[np.ndarray, " P"]


class ImageCache:
    """Prefixes of prompts to one model, in up to `max_bytes` of device memory; the least recently used leave.

    For one thread at a time. hits, misses: prompts with images that found their prefix here, and that did not.
    Raises RerouteError for a model on a mesh, and for a limit that is no whole number from 1 on.
    """

    def __init__(self, weights: Weights, max_bytes: int) -> None:
        if not isinstance(max_bytes, int) or max_bytes < 1:
            raise RerouteError(f"an image cache of {max_bytes!r} bytes, expected a whole number of at least 1")
        if mesh_of(weights) is not None:
            raise RerouteError("an image cache is for a model on one device: load it without a mesh, or leave it out")
        self.weights, self.max_bytes = weights, max_bytes
        self.clear()

    def clear(self) -> None:
        self._kept = Recent(self.max_bytes, lambda prefix: prefix.states.nbytes)
        self.hits = self.misses = 0

    @property
    def nbytes(self) -> int:
        return self._kept.nbytes

    def __len__(self) -> int:
        return len(self._kept)

    def prefixes(
        self, keys: Sequence[Hashable], run: Callable[[Sequence[Hashable]], Mapping[Hashable, Prefix]]
    ) -> list[Prefix]:
        """Those that are kept by these names; `run` makes the others, each once however often it is asked for."""
        found = {key: self._kept.get(key) for key in dict.fromkeys(keys)}
        new = [key for key, prefix in found.items() if prefix is None]
        if new:
            found.update(run(new))
        self.misses += len(new)
        self.hits += len(keys) - len(new)
        for key in keys:
            self._kept.keep(key, found[key])
        return [found[key] for key in keys]


@dataclass(frozen=True)
class CachedPrefill:
    """`running.run_prefill` that takes prefixes from a cache and keeps them there.

    text: room for the text of any prefix and of any batch, for programs that are compiled ahead; None: what fits them.
    """

    cache: ImageCache
    files: SideFiles
    text: int | None = None

    def __call__(self, weights: Weights, batch: Batch) -> tuple[np.ndarray, Prefilled]:
        """The batch need not hold its images' pixels. Raises RerouteError where nothing stands behind an image, and for
        a plan whose prefixes see what stands behind them."""
        firsts = self._firsts(batch)
        if not firsts:
            return run_prefill(weights, batch)
        prefixes = dict(zip(firsts, self._prefixes(weights, batch, list(firsts.values())), strict=True))
        starts = np.zeros(len(batch.live), np.int32)
        index = np.full(batch.prompt.ids.shape, -1, np.int32)
        for row, first in firsts.items():
            starts[row] = length = len(first.ids)
            index[row, :length] = prefixes[row].index[:length]
        # Of any other row everything stands behind a prefix of no length, whose states nobody reads.
        anyones = next(iter(prefixes.values()))
        states = tuple(prefixes.get(row, anyones).states for row in range(len(starts)))
        longest = max(len(layout.ids) - int(start) for layout, start in zip(batch.layouts, starts, strict=False))
        size = batch.prompt.text_slots if self.text else _text_bucket(longest)
        prefilled = programs.prefill_behind(weights.decoder, batch.prompt, states, starts, index, batch.plan, size)
        return _by_feature(batch.prompt.feature, index), prefilled

    def ahead(self, weights: Weights, batch: Batch) -> Prefilled:
        """Compile what a call runs of batches like this one, with as much text in front of their last images and any
        behind them. Returns the shapes of its results. Raises as a call does."""
        firsts = self._firsts(batch)
        if not firsts:
            return prefill_ahead(weights, batch)
        states = self.prefixes_ahead(weights, batch)
        text, starts, index = batch.prompt.text_slots, np.zeros(len(states), np.int32), np.zeros_like(batch.prompt.ids)
        given = weights.decoder, batch.prompt, states, starts, index, batch.plan
        for size in [text] if self.text else _sizes_behind(text, _text_tokens(next(iter(firsts.values())))):
            prefilled = programs.prefill_behind.ahead(*given, size)
        return prefilled

    def prefixes_ahead(self, weights: Weights, batch: Batch) -> tuple[PrefixStates, ...]:
        """Compile what runs new prefixes like those of this batch, as many as it has rows. Returns the shapes of its
        results. Raises as a call does."""
        firsts = self._firsts(batch)
        if not firsts:
            return ()
        together = self._prefix_batch(list(firsts.values()), batch.schedule, len(batch.live))
        features, anchors = programs.encode.ahead(weights, together.images)
        return programs.run_prefix.ahead(weights.decoder, together.prompt, features, anchors, _opening(weights, batch))

    def _firsts(self, batch: Batch) -> dict[int, Layout]:
        """By row, what prompts with images may have in common with others: all up to the last image."""
        return {row: self._first(layout) for row, layout in enumerate(batch.layouts) if layout.question.grids}

    def _first(self, layout: Layout) -> Layout:
        length = prefix_length(layout)
        first = replace(
            layout,
            ids=layout.ids[:length],
            positions=layout.positions[..., :length],
            image=layout.image[:length],
            within=layout.within[:length],
            routed=layout.routed[:length],
        )
        return replace(first, shape=replace(layout.shape, text=self.text or _text_bucket(_text_tokens(first))))

    def _prefixes(self, weights: Weights, batch: Batch, firsts: Sequence[Layout]) -> list[Prefix]:
        """Those that are new run together where their shapes are equal, in numbers that a batch of as many rows may be
        filled up to."""
        opening, schedule = _opening(weights, batch), batch.schedule

        def key_of(first: Layout) -> Hashable:
            question = first.question
            seen = _images_digest(question), question.grids, first.ids.tobytes()
            return *seen, first.shape.slots, schedule.merge, opening

        keys, rows = [key_of(first) for first in firsts], len(batch.live)
        by_key = dict(zip(keys, firsts, strict=True))

        def run(new: Sequence[Hashable]) -> dict[Hashable, Prefix]:
            made = {}
            for _, alike in full_groups(new, lambda key: by_key[key].shape, lambda shape: rows):
                together = self._prefix_batch([by_key[key] for key in alike], schedule, padded_rows(len(alike), rows))
                made.update(zip(alike, _run(weights, together, opening), strict=False))
            return made

        return self.cache.prefixes(keys, run)

    def _prefix_batch(self, firsts: Sequence[Layout], schedule: Schedule, size: int) -> Batch:
        undecided = Schedule(
            (Stage(0, schedule.num_layers),), position_mode=schedule.position_mode, merge=schedule.merge
        )
        return batch_of(firsts, self.files, undecided, size)


def _run(weights: Weights, batch: Batch, opening: Opening) -> list[Prefix]:
    """Of every row of a batch of prefixes."""
    features, anchors = programs.encode(weights, batch.images)
    states = programs.run_prefix(weights.decoder, batch.prompt, features, anchors, opening)
    rows = zip(states, batch.prompt.feature, np.asarray(anchors), strict=True)
    return [Prefix(of_row, np.where(feature < 0, -1, anchor[feature])) for of_row, feature, anchor in rows]


def _opening(weights: Weights, batch: Batch) -> Opening:
    return Opening.of(batch.plan, weights.config.decoder.deepstack)


def _text_tokens(first: Layout) -> int:
    return int((~first.routed).sum())


def _text_bucket(tokens: int) -> int:
    return bucket(tokens, TEXT_BUCKETS, "a prompt, in text tokens,")


def _sizes_behind(text: int, before: int) -> list[int]:
    """Buckets for what stands behind images, in prompts whose text takes a bucket of `text`, `before` tokens of it in
    front of them."""
    fewest = max((step for step in TEXT_BUCKETS if step < text), default=0) + 1
    smallest, largest = _text_bucket(max(1, fewest - before)), _text_bucket(text - before)
    return [step for step in TEXT_BUCKETS if smallest <= step <= largest]


def prefix_length(layout: Layout) -> int:
    """Slots of a prompt with images up to the last of them. Raises RerouteError where nothing stands behind it."""
    length = int(np.flatnonzero(layout.image >= 0)[-1]) + 1
    if length == len(layout.ids):
        raise RerouteError("the prompt ends with its image: ask something behind it, or leave out the image cache")
    return length


def _images_digest(question: Question) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    for image in question.images:
        digest.update(str(image.shape).encode())
        digest.update(np.ascontiguousarray(image))
    return digest.digest()


def _by_feature(feature: Int[np.ndarray, "B T"], index: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B F"]:
    """`index` as `features.image_features` gives it, of the features that slots read."""
    rows, slots = np.nonzero(feature >= 0)
    anchors = np.zeros((len(feature), int(feature.max()) + 1), np.int32)
    anchors[rows, feature[rows, slots]] = index[rows, slots]
    return anchors
