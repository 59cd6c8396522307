"""Caches of earlier layers, cut to what the last decision left (15.1)."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Array, Int

from reroute_jax.nn.cache import ROOM, KVRows, StageCache, with_room
from reroute_jax.routing.ops import compact_slots, gather_keys


def cut(stages: Sequence[StageCache], slots: Sequence[Int[Array, "B _"]], first_too: bool) -> list[StageCache]:
    """The stages with nothing in an earlier layer that the last one does not hold; of a reroute, what both hold.

    slots: where in the prompt each stage's rows stood, -1 for padding. first_too: whether layer 0 is cut as well.
    Every cut buffer is as long as the last stage's.
    """
    *earlier, last = zip(stages, slots, strict=True)
    short = []
    for number, (stage, own) in enumerate(earlier):
        if number == 0 and not first_too:
            first, stage = _split(stage)
            short.append(first)
        if stage.keys:
            short.append(_cut_stage(stage, own, last[1]))
    return [*short, last[0]]


def _split(stage: StageCache) -> tuple[StageCache, StageCache]:
    """The first layer, and the others."""
    rest = stage.length, stage.next_position
    return StageCache(stage.keys[:1], stage.values[:1], *rest), StageCache(stage.keys[1:], stage.values[1:], *rest)


def _cut_stage(stage: StageCache, own: Int[Array, "B S"], held: Int[Array, "B C"]) -> StageCache:
    stays = (own[:, :, None] == held[:, None]).any(axis=2) & (own >= 0)
    index = compact_slots(stays, held.shape[1])

    def cut_one(x: KVRows) -> KVRows:
        return with_room(gather_keys(x, index), ROOM)

    keys, values = (tuple(map(cut_one, arrays)) for arrays in (stage.keys, stage.values))
    return StageCache(keys, values, stays.sum(axis=1), stage.next_position)
