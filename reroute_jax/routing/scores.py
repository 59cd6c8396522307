"""How decisions rank visual tokens (2.1, 4.6, 5.4, 13): a name in `Stage.score`, a small class with its rule and cost.

Letters as in `nn/layers.py`; n: original visual tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from reroute_jax.config import DecoderConfig
from reroute_jax.nn.attention import query_probabilities
from reroute_jax.nn.layers import DecoderLayer, take_rows
from reroute_jax.routing.ops import Rows, compact_slots, gather_keys, select


@jax.tree_util.register_dataclass
@dataclass
class LastLayer:
    """The layer before a decision: its input, its output, and the values that it cached, of the rows that it ran."""

    hidden: Float[Array, "B S D"]
    output: Float[Array, "B S D"]
    values: Float[Array, "B K S H"]


@dataclass(frozen=True)
class Sight:
    """What a decision at the input of layer `lo` sees.

    rows: that input. last: layer lo - 1, None at layer 0. change: of a score that `reads_change`, how far each row
    moved when a layer last ran it, fp32. prior: host-made scores by original visual index. routed: of the prompt's
    slots. seeds: of a score that `has_seeds`, how many tokens of its first pass it looks from, at most seed_cap.
    text_slots: no row has more tokens that are not routed. bidirectional_layer: that runs without the causal mask.
    """

    layers: Sequence[DecoderLayer]
    lo: int
    rows: Rows
    last: LastLayer | None
    change: Float[Array, "B T"] | None
    prior: Float[Array, "B n"] | None
    routed: Bool[Array, "B S"]
    seeds: Int[Array, " B"] | None
    seed_cap: int
    text_slots: int
    bidirectional_layer: int | None


class Ranked(NamedTuple):
    """scores: fp32, of all rows, and read where a row is eligible. keys: of layer lo, where scoring made them, at their
    positions. seeds: the rows that a second pass looked from."""

    scores: Float[Array, "B T"]
    keys: Float[Array, "B K T H"] | None = None
    seeds: Bool[Array, "B T"] | None = None


class Score:
    """previous: needs a layer before the decision. all_rows: needs every candidate to have run it, so that no reroute
    may come before. projects: multiplies with a layer's projections. reuses_keys: leaves layer lo its keys. has_seeds:
    looks a second time, from the best of the first. reads_change: ranks by how far layers moved a row."""

    previous: ClassVar[bool] = False
    all_rows: ClassVar[bool] = False
    projects: ClassVar[bool] = False
    reuses_keys: ClassVar[bool] = False
    has_seeds: ClassVar[bool] = False
    reads_change: ClassVar[bool] = False

    def rank(self, sight: Sight) -> Ranked:
        raise NotImplementedError

    def macs(self, config: DecoderConfig, visual: int, text: int) -> int:
        """Multiply-accumulates for a row of `visual` candidates and `text` other tokens (8.2, 20)."""
        raise NotImplementedError


@dataclass(frozen=True)
class LastToken(Score):
    """Attention of the last token, mean over heads (2.1).

    previous: by layer lo - 1 on its own input, not by layer lo. rotated: with rotary positions; without them (13.2)
    near tokens have no advantage. visual_only: the softmax is over the candidates alone (13.1).
    """

    projects = True

    previous: bool = False
    rotated: bool = True
    visual_only: bool = False

    @property
    def all_rows(self) -> bool:
        return self.previous

    @property
    def reuses_keys(self) -> bool:
        return not self.previous

    def rank(self, sight: Sight) -> Ranked:
        probabilities, keys = _attention(sight, self.previous, 1, self.rotated, self.visual_only)
        return Ranked(probabilities.mean(axis=(1, 2)), None if self.previous else keys)

    def macs(self, config: DecoderConfig, visual: int, text: int) -> int:
        return _attention_macs(config, visual if self.visual_only else visual + text, queries=1)


@dataclass(frozen=True)
class LastThree(Score):
    """Attention of the last three tokens in the layer before, in the head that attends most (5.4)."""

    previous = all_rows = projects = True

    def rank(self, sight: Sight) -> Ranked:
        probabilities, _ = _attention(sight, previous=True, queries=3, rotated=True, visual_only=False)
        return Ranked(probabilities.mean(axis=2).max(axis=1))

    def macs(self, config: DecoderConfig, visual: int, text: int) -> int:
        return _attention_macs(config, visual + text, queries=3)


@dataclass(frozen=True)
class Prior(Score):
    """Scores that the host makes."""

    def rank(self, sight: Sight) -> Ranked:
        visual, count = sight.rows.visual, sight.prior.shape[-1]
        return Ranked(take_rows(sight.prior, jnp.where(visual < 0, count, visual)))

    def macs(self, config: DecoderConfig, visual: int, text: int) -> int:
        return 0


@dataclass(frozen=True)
class ValueSimilarity(Score):
    """Similarity of the text's values to those of the candidates, in two passes (13.3): the best of the first, the
    seeds, count as queries of the second.

    own: values of layer lo of every row, and not those that layer lo - 1 cached. visual_only: as of `LastToken`.
    """

    has_seeds = True

    own: bool = False
    visual_only: bool = True

    @property
    def previous(self) -> bool:
        return not self.own

    @property
    def all_rows(self) -> bool:
        return not self.own

    @property
    def projects(self) -> bool:
        return self.own

    def rank(self, sight: Sight) -> Ranked:
        rows = sight.rows
        with jax.named_scope("scoring"):
            values = self._values(sight).astype(jnp.float32)
            keys_seen = rows.eligible if self.visual_only else rows.valid

            def similarity(chosen: Bool[Array, "B T"], size: int) -> Float[Array, "B T"]:
                """Sum over the chosen rows."""
                slots = compact_slots(chosen, size)
                mask = jnp.broadcast_to(keys_seen[:, None], (*slots.shape, keys_seen.shape[1]))
                weights = query_probabilities(gather_keys(values, slots), values, mask).mean(axis=1)
                there = slots < chosen.shape[1]
                return jnp.where(there[..., None], weights, 0).sum(axis=1)

            behind = jnp.where(sight.routed, jnp.arange(sight.routed.shape[1]) + 1, 0).max(axis=1)
            queries = text_queries(rows, behind)
            first, count = similarity(queries, sight.text_slots), queries.sum(axis=1)
            seeds = select(first, rows.eligible, sight.seeds, sight.seed_cap)
            second = first + similarity(seeds, sight.seed_cap)
            return Ranked(second / (count + seeds.sum(axis=1))[:, None], seeds=seeds)

    def _values(self, sight: Sight) -> Float[Array, "B K T H"]:
        if not self.own:
            return sight.last.values
        layer = sight.layers[sight.lo]
        return layer.attn.v(layer.attn_norm(sight.rows.hidden))

    def macs(self, config: DecoderConfig, visual: int, text: int) -> int:
        """All of the text counts as behind the image."""
        seen, width = visual if self.visual_only else visual + text, config.num_kv_heads * config.head_dim
        projection = (visual + text) * config.hidden_size * width if self.own else 0
        return projection + (text + default_seeds(visual)) * seen * width


@dataclass(frozen=True)
class HiddenChange(Score):
    """How far the last layer that ran a token moved its hidden state (13.4)."""

    previous = reads_change = True

    def rank(self, sight: Sight) -> Ranked:
        return Ranked(sight.change)

    def macs(self, config: DecoderConfig, visual: int, text: int) -> int:
        return visual * config.hidden_size


SCORES: dict[str, Score] = {
    "last_token": LastToken(),
    "last_token_visual": LastToken(visual_only=True),
    "last_token_unrotated": LastToken(rotated=False, visual_only=True),
    "previous_layer": LastToken(previous=True),
    "previous_layer_unrotated": LastToken(previous=True, rotated=False, visual_only=True),
    "previous_layer_last_three": LastThree(),
    "value_similarity": ValueSimilarity(),
    "value_similarity_all_rows": ValueSimilarity(visual_only=False),
    "value_similarity_own": ValueSimilarity(own=True),
    "hidden_change": HiddenChange(),
    "prior": Prior(),
}


def default_seeds(visual: int) -> int:
    """Seeds of a second pass where no floor says otherwise: 1 % of a row's visual tokens, halves to even (13.3)."""
    return max(1, round(visual / 100)) if visual else 0


def text_queries(rows: Rows, behind: Int[Array, " B"]) -> Bool[Array, "B T"]:
    """The text from the third token behind the image on; where there is none all that is behind it, and where nothing
    is the last token (13.3). behind: slot of the prompt behind a row's last visual token that is routed."""
    distance = jnp.where(rows.valid, rows.slot - behind[:, None], -1)
    far, near = distance >= 2, distance >= 0
    last = jnp.arange(far.shape[1]) == rows.last[:, None]
    text = jnp.where(far.any(axis=1, keepdims=True), far, near)
    return jnp.where(near.any(axis=1, keepdims=True), text, last)


def hidden_change(before: Float[Array, "B T D"], after: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    """Euclidean distance, fp32 (13.4)."""
    return jnp.linalg.norm(after.astype(jnp.float32) - before.astype(jnp.float32), axis=-1)


def _attention(sight: Sight, previous: bool, queries: int, rotated: bool, visual_only: bool):
    """Probabilities `[B, N, Q, T]` of a row's last tokens and the keys of the layer that made them."""
    rows, layer = sight.rows, sight.lo - previous
    hidden = sight.last.hidden if previous else rows.hidden
    tokens = jnp.maximum(rows.last[:, None] - jnp.arange(queries - 1, -1, -1), 0)
    slots = jnp.arange(rows.valid.shape[1])
    if visual_only:
        mask = rows.eligible[:, None]
    else:
        mask = rows.valid[:, None] if layer == sight.bidirectional_layer else slots <= tokens[..., None]
    mask = jnp.broadcast_to(mask, (*tokens.shape, len(slots)))
    return sight.layers[layer].probabilities(hidden, rows.rope, tokens, mask, rotated)


def _attention_macs(config: DecoderConfig, rows: int, queries: int) -> int:
    """In the least form: the keys of these rows, and the queries (8.2)."""
    width, keys = config.hidden_size, config.num_kv_heads * config.head_dim
    heads = config.num_heads * config.head_dim
    return rows * width * keys + queries * (width * heads + rows * heads)
