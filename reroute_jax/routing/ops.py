"""Selection, compaction and return of rows, with static shapes.

Rows are right-padded: valid slots stand first and in prompt order. Compaction keeps that, so the causal mask of a
compact layer is an ordinary triangle.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from reroute_jax.nn.cache import KVRows
from reroute_jax.nn.layers import Rope, take_rows
from reroute_jax.nn.sharding import per_device


@jax.tree_util.register_dataclass
@dataclass
class Rows:
    """Hidden states that travel together.

    slot: where a row stood in the prompt, -1 for padding and for proxies (15.2).
    visual: index of a visual token among its row's original visual tokens, -1 for text.
    eligible: visual tokens that the next decision may select.
    """

    hidden: Float[Array, "B T D"]
    rope: Rope
    slot: Int[Array, "B T"]
    visual: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    eligible: Bool[Array, "B T"]

    @property
    def last(self) -> Int[Array, " B"]:
        """Slot of each row's last token."""
        return self.valid.sum(axis=1) - 1


def select(
    scores: Float[Array, "B T"], eligible: Bool[Array, "B T"], keep: Int[Array, " B"], cap: int
) -> Bool[Array, "B T"]:
    """The `keep[b]` best eligible slots of each row, `keep[b] <= cap`; of equal scores the lowest slot wins.

    A sort is a program of its own, which the TPU compiler takes seconds to make: accelerators compare all pairs and
    count, in one pass that XLA fuses. On a CPU that is the slower way (640 slots, batch 8: 9.8 ms for a decision's
    three steps, not 0.4; jax 0.10.2, November 2026).
    """
    value = jnp.where(eligible, scores, -jnp.inf)
    ways = {"cpu": partial(_best_by_top_k, cap=cap), "default": _best_by_counting}
    return eligible & per_device(partial(jax.lax.platform_dependent, **ways), value, keep)


def choose(
    scores: Float[Array, "B T"],
    eligible: Bool[Array, "B T"],
    keep: Int[Array, " B"],
    cap: int,
    floor: Bool[Array, "B T"] | None,
    union: bool,
) -> Bool[Array, "B T"]:
    """`select`, with the eligible slots of a floor inside the count, or with `union` on top of it (14.3). A floor that
    is larger than the count gives its lowest slots."""
    if floor is None:
        return select(scores, eligible, keep, cap)
    if union:
        return select(scores, eligible, keep, cap) | (floor & eligible)
    return select(jnp.where(floor, jnp.inf, scores), eligible, keep, cap)


def _best_by_top_k(value: Float[Array, "B T"], keep: Int[Array, " B"], cap: int) -> Bool[Array, "B T"]:
    _, best = jax.lax.top_k(value, cap)
    wanted = jnp.arange(cap) < keep[:, None]
    return jax.vmap(lambda slots, on: jnp.zeros(value.shape[1], bool).at[slots].set(on))(best, wanted)


def _best_by_counting(value: Float[Array, "B T"], keep: Int[Array, " B"]) -> Bool[Array, "B T"]:
    """A slot's rank is the number of those that beat it."""
    mine, other, slots = value[:, :, None], value[:, None], jnp.arange(value.shape[1])
    beaten = (other > mine) | ((other == mine) & (slots < slots[:, None]))
    return beaten.sum(axis=2) < keep[:, None]


def compact_slots(running: Bool[Array, "B T"], size: int) -> Int[Array, "B C"]:
    """Slots of running rows, ascending; behind them T, T + 1, ..., which are out of range. Two ways, as of `select`."""
    ways = {"cpu": partial(_running_sorted, size=size), "default": partial(_running_counted, size=size)}
    slots, order = jax.lax.platform_dependent(running, **ways), jnp.arange(size)
    behind = order - running.sum(axis=1, keepdims=True)
    return jnp.where(behind < 0, slots, running.shape[1] + behind)


def _running_sorted(running: Bool[Array, "B T"], size: int) -> Int[Array, "B C"]:
    slots = running.shape[1]
    return jnp.sort(jnp.where(running, jnp.arange(slots), slots), axis=1)[:, :size]


def _running_counted(running: Bool[Array, "B T"], size: int) -> Int[Array, "B C"]:
    """The slot that runs as number c is the first up to which more than c run."""
    slots = jnp.arange(running.shape[1])
    place = (running[:, None] & (slots <= slots[:, None])).sum(axis=2)
    return (place[:, None] <= jnp.arange(size)[:, None]).sum(axis=2)


def gather(rows: Rows, slots: Int[Array, "B C"]) -> Rows:
    """The rows at `slots`; out-of-range slots become invalid padding."""
    # In one gather, where zeros of padding become -1.
    marks = take_rows(jnp.stack([rows.slot + 1, rows.visual + 1, rows.eligible], axis=-1), slots)
    return Rows(
        hidden=take_rows(rows.hidden, slots),
        rope=Rope(*(take_rows(table, slots) for table in rows.rope)),
        slot=marks[..., 0] - 1,
        visual=marks[..., 1] - 1,
        valid=slots < rows.valid.shape[1],
        eligible=marks[..., 2] > 0,
    )


def gather_keys(keys: KVRows, slots: Int[Array, "B C"]) -> KVRows:
    take = jax.vmap(lambda row, index: row.at[:, index].get(mode="fill", fill_value=0))
    return jax.tree.map(lambda part: take(part, slots), keys)


def put_rows(old: Array, slots: Int[Array, "B C"], new: Array) -> Array:
    """`old` with `new[b, c]` at `slots[b, c]`; slots out of range are dropped. slots: of `compact_slots`."""
    promised = {"mode": "drop", "indices_are_sorted": True, "unique_indices": True}
    return jax.vmap(lambda row, index, values: row.at[index].set(values, **promised))(old, slots, new)


def scatter(rows: Rows, slots: Int[Array, "B C"], processed: Rows) -> Rows:
    """Write processed hidden states back; rows that were deferred keep theirs. slots: of `compact_slots`."""
    return replace(rows, hidden=put_rows(rows.hidden, slots, processed.hidden))


def whole_share(share: Fraction, counts: Int[Array, " B"]) -> Int[Array, " B"]:
    """`int(share * count)` in whole numbers: a float product could fall short of one."""
    return counts * share.numerator // share.denominator


def by_visual_index(values: Array, visual: Int[Array, "B T"], count: int) -> Array:
    """Re-order per-slot values `[B, T]` by original visual index, `[B, count]`; absent tokens get -inf, or False. Two
    ways, as of `select`."""
    fill = False if values.dtype == bool else -jnp.inf

    def scattered(values: Array, visual: Array) -> Array:
        target = jnp.where(visual < 0, count, visual)
        place = jax.vmap(lambda index, row: jnp.full(count, fill, row.dtype).at[index].set(row, mode="drop"))
        return place(target, values)

    def compared(values: Array, visual: Array) -> Array:
        here = visual[:, None] == jnp.arange(count)[:, None]
        return jnp.where(here, values[:, None], fill).max(axis=2)

    return jax.lax.platform_dependent(values, visual, cpu=scattered, default=compared)
