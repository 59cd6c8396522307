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

    visual: index of a visual token among its row's original visual tokens, -1 for text.
    eligible: visual tokens that the next decision may select.
    """

    hidden: Float[Array, "B T D"]
    rope: Rope
    visual: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    eligible: Bool[Array, "B T"]

    @property
    def last(self) -> Int[Array, " B"]:
        """Slot of each row's last token."""
        return self.valid.sum(axis=1) - 1


def select(
    scores: Float[Array, "B T"], eligible: Bool[Array, "B T"], cap: int, keep: Int[Array, " B"]
) -> Bool[Array, "B T"]:
    """The `keep[b]` best eligible slots of each row, `keep[b] <= cap`; of equal scores the lowest slot wins."""
    _, best = jax.lax.top_k(jnp.where(eligible, scores, -jnp.inf), cap)
    wanted = jnp.arange(cap) < keep[:, None]
    return jax.vmap(lambda slots, on: jnp.zeros(scores.shape[1], bool).at[slots].set(on))(best, wanted)


def compact_slots(running: Bool[Array, "B T"], size: int) -> Int[Array, "B C"]:
    """Slots of running rows, ascending, padded with the out-of-range slot T."""
    slots = running.shape[1]
    return jnp.sort(jnp.where(running, jnp.arange(slots), slots), axis=1)[:, :size]


def gather(rows: Rows, slots: Int[Array, "B C"]) -> Rows:
    """The rows at `slots`; out-of-range slots become invalid padding."""
    inside = slots < rows.valid.shape[1]
    return Rows(
        hidden=take_rows(rows.hidden, slots),
        rope=Rope(*(take_rows(table, slots) for table in rows.rope)),
        visual=jnp.where(inside, take_rows(rows.visual, slots), -1),
        valid=inside,
        eligible=take_rows(rows.eligible, slots),
    )


def gather_keys(keys: Float[Array, "B K T H"], slots: Int[Array, "B C"]) -> Float[Array, "B K C H"]:
    return jax.vmap(lambda row, index: row.at[:, index].get(mode="fill", fill_value=0))(keys, slots)


def scatter(rows: Rows, slots: Int[Array, "B C"], processed: Rows) -> Rows:
    """Write processed hidden states back; rows that were deferred keep theirs."""
    hidden = jax.vmap(lambda row, index, new: row.at[index].set(new, mode="drop", indices_are_sorted=True))(
        rows.hidden, slots, processed.hidden
    )
    return replace(rows, hidden=hidden)


def by_visual_index(values: Array, visual: Int[Array, "B T"], count: int, fill: float | bool) -> Array:
    """Re-order per-slot values `[B, T]` by original visual index, `[B, count]`; absent tokens get `fill`."""
    target = jnp.where(visual < 0, count, visual)
    return jax.vmap(lambda index, row: jnp.full(count, fill, values.dtype).at[index].set(row, mode="drop"))(
        target, values
    )
