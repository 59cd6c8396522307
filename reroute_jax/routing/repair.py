"""What is done for tokens that wait while a stage runs without them, so that they do not return as stale as they left
(15.2): a name in `Stage.repair`, a small class with its rule and its cost.

Letters: B batch, T slots of the layout, G proxies of the row with most, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from reroute_jax.config import DecoderConfig
from reroute_jax.nn.layers import take_rows
from reroute_jax.routing.groups import group_means, nearest, targets
from reroute_jax.routing.ops import Rows, compact_slots

_FOR_EACH_PROXY = 32  # visual tokens of a row at the decoder input


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bypass:
    """A stage's tokens that wait, from the decision that leaves them out to the next one. This one does nothing."""

    def running(self, chosen: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
        """Slots that the stage runs, where a decision has `chosen` these."""
        return chosen

    def entering(self, rows: Rows) -> Rows:
        """The layout as the stage gathers from it."""
        return rows

    def returned(self, before: Rows, after: Rows) -> Rows:
        """The layout behind the stage. before, after: without and with what the stage wrote back."""
        return after

    def untouched(self, before: Array, after: Array) -> Array:
        """Values by slot, of which the stage wrote some: those of tokens that wait are as they were."""
        return after

    def proxies(self, rows: Rows) -> Int[Array, " B"]:
        """How many ran in the place of others."""
        return jnp.zeros(rows.valid.shape[0], jnp.int32)


class Repair:
    """This one repairs nothing."""

    def proxies(self, visual: int, waiting: int) -> int:
        """How many run while `waiting` of a row's `visual` tokens at the decoder input wait."""
        return 0

    def leave(self, rows: Rows, chosen: Bool[Array, "B T"], waiting: Bool[Array, "B T"], visual, most: int) -> Bypass:
        """Of a decision's input `rows`. visual: Int `[B]`, tokens at the decoder input. most: proxies of a row."""
        return Bypass()

    def macs(self, config: DecoderConfig, visual: int, waiting: int) -> int:
        """Multiply-accumulates for a row (20)."""
        return 0


# --- Offset of a proxy ------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ProxyBypass(Bypass):
    """waits: tokens that do. seeds: those whose slots and positions proxies take; group: number of each one's proxy,
    any elsewhere. inserted: the proxies as they enter."""

    waits: Bool[Array, "B T"]
    seeds: Bool[Array, "B T"]
    group: Int[Array, "B T"]
    inserted: Float[Array, "B G D"]

    def running(self, chosen: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
        return chosen | self.seeds

    def entering(self, rows: Rows) -> Rows:
        """A proxy is no visual token: no decision selects it, it stands for no slot, DeepStack adds nothing to it."""
        hidden = jnp.where(self.seeds[..., None], take_rows(self.inserted, self.group), rows.hidden)
        slot, visual = (jnp.where(self.seeds, -1, mark) for mark in (rows.slot, rows.visual))
        return replace(rows, hidden=hidden, slot=slot, visual=visual, eligible=rows.eligible & ~self.seeds)

    def returned(self, before: Rows, after: Rows) -> Rows:
        """Each token that waited moves as its proxy did."""
        slots = compact_slots(self.seeds, self.inserted.shape[1])
        left = take_rows(after.hidden, slots).astype(jnp.float32)
        moved = take_rows(left - self.inserted.astype(jnp.float32), self.group)
        repaired = (before.hidden.astype(jnp.float32) + moved).astype(before.hidden.dtype)
        return replace(after, hidden=jnp.where(self.waits[..., None], repaired, after.hidden))

    def untouched(self, before: Array, after: Array) -> Array:
        return jnp.where(self.seeds, before, after)

    def proxies(self, rows: Rows) -> Int[Array, " B"]:
        return self.seeds.sum(axis=1)


@dataclass(frozen=True)
class ProxyOffset(Repair):
    """SwiftVLM (arXiv 2602.03134): tokens that wait form groups by cosine similarity of their hidden states. The mean
    of each group, its proxy, runs the stage in the place of its seed, and its members move as it moved. How many there
    are and which tokens are seeds is our choice."""

    def proxies(self, visual: int, waiting: int) -> int:
        return min(max(1, visual // _FOR_EACH_PROXY), waiting)

    def leave(self, rows: Rows, chosen: Bool[Array, "B T"], waiting: Bool[Array, "B T"], visual, most: int) -> Bypass:
        seeds, number = targets(waiting, jnp.maximum(1, visual // _FOR_EACH_PROXY))
        group = jnp.where(seeds, number, nearest(rows.hidden, seeds, most))
        means = group_means(rows.hidden, group, waiting, most)
        return ProxyBypass(waiting, seeds, group, means.astype(rows.hidden.dtype))

    def macs(self, config: DecoderConfig, visual: int, waiting: int) -> int:
        return waiting * (self.proxies(visual, waiting) + 2) * config.hidden_size


# --- Offset of the mean -----------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MeanBypass(Bypass):
    waits: Bool[Array, "B T"]
    chosen: Bool[Array, "B T"]

    def returned(self, before: Rows, after: Rows) -> Rows:
        moved = after.hidden.astype(jnp.float32) - before.hidden.astype(jnp.float32)
        one = jnp.zeros(self.chosen.shape, jnp.int32)
        mean = group_means(moved, one, self.chosen, 1)
        repaired = (before.hidden.astype(jnp.float32) + mean).astype(before.hidden.dtype)
        return replace(after, hidden=jnp.where(self.waits[..., None], repaired, after.hidden))


@dataclass(frozen=True)
class MeanOffset(Repair):
    """Tokens that wait move as the visual tokens that ran did on the average: nothing runs for them."""

    def leave(self, rows: Rows, chosen: Bool[Array, "B T"], waiting: Bool[Array, "B T"], visual, most: int) -> Bypass:
        return MeanBypass(waiting, chosen)

    def macs(self, config: DecoderConfig, visual: int, waiting: int) -> int:
        return visual * config.hidden_size


REPAIRS: dict[str | None, Repair] = {None: Repair(), "proxy_offset": ProxyOffset(), "mean_offset": MeanOffset()}
