"""Selection, compaction and return of rows, with static shapes.

Rows are right-padded: valid slots stand first and in prompt order. Compaction keeps that, so the causal mask of a
compact layer is an ordinary triangle.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from reroute_jax.nn.layers import Rope, take_rows


@jax.tree_util.register_dataclass
@dataclass
class Rows:
    """Hidden states that travel together.

    slot: where a row stood in the prompt, -1 for padding.
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


def select(scores: Float[Array, "B T"], eligible: Bool[Array, "B T"], keep: Int[Array, " B"]) -> Bool[Array, "B T"]:
    """The `keep[b]` best eligible slots of each row; of equal scores the lowest slot wins.

    A slot's rank is the number of those that beat it: all pairs compared and counted in one pass that XLA fuses. A sort
    is a program of its own, which the TPU compiler takes seconds to make.
    """
    value, slots = jnp.where(eligible, scores, -jnp.inf), jnp.arange(scores.shape[1])
    mine, other = value[:, :, None], value[:, None]
    beaten = (other > mine) | ((other == mine) & (slots < slots[:, None]))
    return eligible & (beaten.sum(axis=2) < keep[:, None])


def compact_slots(running: Bool[Array, "B T"], size: int) -> Int[Array, "B C"]:
    """Slots of running rows, ascending; behind them T, T + 1, ..., which are out of range. Without a sort, see
    `select`."""
    place, order = _places(running), jnp.arange(size)
    slots = (place[:, None] <= order[:, None]).sum(axis=2)
    return slots + jnp.maximum(order - running.sum(axis=1, keepdims=True), 0)


def _places(running: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """How many slots run up to each, itself included: the slot that runs as number c is the first with more than c."""
    slots = jnp.arange(running.shape[1])
    return (running[:, None] & (slots <= slots[:, None])).sum(axis=2)


def gather(rows: Rows, slots: Int[Array, "B C"]) -> Rows:
    """The rows at `slots`; out-of-range slots become invalid padding."""
    inside = slots < rows.valid.shape[1]
    return Rows(
        hidden=take_rows(rows.hidden, slots),
        rope=Rope(*(take_rows(table, slots) for table in rows.rope)),
        slot=jnp.where(inside, take_rows(rows.slot, slots), -1),
        visual=jnp.where(inside, take_rows(rows.visual, slots), -1),
        valid=inside,
        eligible=take_rows(rows.eligible, slots),
    )


def gather_keys(keys: Float[Array, "B K T H"], slots: Int[Array, "B C"]) -> Float[Array, "B K C H"]:
    return jax.vmap(lambda row, index: row.at[:, index].get(mode="fill", fill_value=0))(keys, slots)


def scatter(rows: Rows, slots: Int[Array, "B C"], processed: Rows) -> Rows:
    """Write processed hidden states back; rows that were deferred keep theirs. slots: of `compact_slots`."""
    promised = {"mode": "drop", "indices_are_sorted": True, "unique_indices": True}
    hidden = jax.vmap(lambda row, index, new: row.at[index].set(new, **promised))(rows.hidden, slots, processed.hidden)
    return replace(rows, hidden=hidden)


def by_visual_index(values: Array, visual: Int[Array, "B T"], count: int) -> Array:
    """Re-order per-slot values `[B, T]` by original visual index, `[B, count]`; absent tokens get -inf, or False."""
    here = visual[:, None] == jnp.arange(count)[:, None]
    return jnp.where(here, values[:, None], False if values.dtype == bool else -jnp.inf).max(axis=2)
