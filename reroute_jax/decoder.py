"""The decoder and the only code that walks stages.

A stage is a run of layers on one set of tokens. Stages after the first open with a decision: score the candidates,
keep the best, gather them with all text into a shorter sequence, run the stage's layers on that. A decision that
deletes continues with the shorter sequence. One that reroutes (arXiv 2606.12412) writes it back into the full one,
where deferred tokens kept their hidden states, and the next decision chooses among all of them again.

Letters: F image features of a row, E their width: the decoder's, and as much again for each of DeepStack's levels,
which stand behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from reroute_jax.config import DecoderConfig
from reroute_jax.nn.cache import Cached, KVCache, StageCache
from reroute_jax.nn.layers import DecoderLayer, RMSNorm, Rope, parameter, take_rows
from reroute_jax.nn.positions import rope_tables
from reroute_jax.nn.products import matmul
from reroute_jax.nn.quantised import plain, rows_of
from reroute_jax.nn.sharding import constrain
from reroute_jax.routing.cuts import cut
from reroute_jax.routing.ops import (
    Rows,
    by_visual_index,
    choose,
    compact_slots,
    gather,
    gather_keys,
    put_rows,
    scatter,
    whole_share,
)
from reroute_jax.routing.repair import REPAIRS, Bypass
from reroute_jax.routing.scores import SCORES, LastLayer, Ranked, Sight, hidden_change
from reroute_jax.routing.static_plan import RoutingPlan, StagePlan
from reroute_jax.types import AnyArray


class Embedding(nnx.Module):
    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype):
        shape = (config.vocab_size, config.hidden_size)
        self.table = parameter(rngs, shape, ("vocab", "embed"), dtype, config.hidden_size)

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return constrain(rows_of(self.table.get_value(), ids), "rows")


class Head(nnx.Module):
    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype):
        shape = (config.vocab_size, config.hidden_size)
        self.kernel = parameter(rngs, shape, ("vocab", "embed"), dtype, config.hidden_size)


class Decoder(nnx.Module):
    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype):
        self.config = config
        self.embed = Embedding(config, rngs=rngs, dtype=dtype)
        self.layers = nnx.List([DecoderLayer(config, rngs=rngs, dtype=dtype) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.head = None if config.tied_head else Head(config, rngs=rngs, dtype=dtype)

    def logits(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows vocab"]:
        """fp32 logits of hidden states."""
        kernel = plain((self.embed.table if self.head is None else self.head.kernel).get_value())
        y = matmul(self.norm(x), kernel, jnp.float32)
        return constrain(y, "rows", *[None] * (y.ndim - 2), "vocab")


@jax.tree_util.register_dataclass
@dataclass
class Prompt:
    """A right-padded batch as the host prepares it. `n` is the largest original visual count of a row.

    ids: token ids; positions: rotary positions in the unpruned prompt, three of each with M-RoPE.
    feature: for a visual slot which of its row's image features it reads, else -1.
    routed: visual slots that decisions choose among; others run like text.
    visual_positions: rotary positions of the row's original visual tokens.
    keep: per decision and row, how many visual tokens to select.
    seeds: per decision and row, tokens that the second pass of a score looks from.
    prior: per decision and row, host-made scores by original visual index (controls); zero decisions when unused.
    floor: per decision and row, tokens that must be kept, by original visual index; zero decisions when unused.
    next_position: position of the first generated token.
    text_slots: static; no row has more tokens that are not routed.
    """

    ids: Int[AnyArray, "B T"]
    positions: Int[AnyArray, "*channels B T"]
    valid: Bool[AnyArray, "B T"]
    feature: Int[AnyArray, "B T"]
    routed: Bool[AnyArray, "B T"]
    visual_positions: Int[AnyArray, "*channels B n"]
    keep: Int[AnyArray, "J B"]
    seeds: Int[AnyArray, "J B"]
    prior: Float[AnyArray, "P B n"]
    floor: Bool[AnyArray, "W B n"]
    next_position: Int[AnyArray, " B"]
    text_slots: int = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass
class Decision:
    """What one decision saw and chose, by original visual index. proxies: how many rows ran for tokens that wait."""

    scores: Float[Array, "B n"]
    selected: Bool[Array, "B n"]
    proxies: Int[Array, " B"]


@jax.tree_util.register_dataclass
@dataclass
class Prefilled:
    """logits: fp32, last valid token of each row. finite: per stage, whether that token left it as finite numbers."""

    logits: Float[Array, "B vocab"]
    finite: Bool[Array, "stages B"]
    cache: KVCache
    decisions: tuple[Decision, ...]


@jax.tree_util.register_dataclass
@dataclass
class Walked:
    """rows: those that ran the last stage."""

    rows: Rows
    finite: Bool[Array, "stages B"]
    cache: KVCache
    decisions: tuple[Decision, ...]


def forward(
    decoder: Decoder,
    x: Float[Array, "B T D"],
    rope: Rope,
    mask: Bool[Array, "#B T T"],
    deepstack: Sequence[Float[Array, "B T D"]] = (),
) -> Float[Array, "B T D"]:
    """All layers on all tokens under an explicit mask, without a cache: training and all-position logits.

    deepstack: what is added to the output of each of the first layers, zeros for text.
    """
    for number, layer in enumerate(decoder.layers):
        x, _, _ = layer.prefill(x, rope, mask)
        x = x + deepstack[number] if number < len(deepstack) else x
    return x


def prefill(
    decoder: Decoder,
    prompt: Prompt,
    features: Float[Array, "B F E"],
    anchors: Int[Array, "B F"],
    plan: RoutingPlan,
) -> Prefilled:
    """Run a prompt through the staged decoder, for decoding from its last token; arguments as of `walk`."""
    return predicted(decoder, walk(decoder, prompt, features, anchors, plan))


def walk(
    decoder: Decoder, prompt: Prompt, features: Float[Array, "B F E"], anchors: Int[Array, "B F"], plan: RoutingPlan
) -> Walked:
    """Run a prompt through all stages.

    features: of each row's images. anchors: the index of each among its row's original (unmerged) features. plan:
    static.
    """
    deepstack = partial(add_deepstack, prompt.feature, features)
    with jax.named_scope("embedding"):
        rows = prompt_rows(decoder, prompt, features, anchors, plan.renumbers_input)
    opening = StagePlan(0, plan.undecided, None, None, None)
    opened = run_layers(decoder, opening, rows, None, plan.bidirectional_layer, deepstack)
    return decide(decoder, prompt, plan, deepstack, *opened)


def decide(
    decoder: Decoder,
    prompt: Prompt,
    plan: RoutingPlan,
    deepstack: Callable,
    rows: Rows,
    last: LastLayer | None,
    cached: Cached,
) -> Walked:
    """All decisions and what runs behind them. rows, last, cached: of the layers before the first one, as of
    `run_layers`."""
    tracked = any(SCORES[stage.score].reads_change for stage in plan.stages if stage.score is not None)
    stages, finite, decisions, ran, change = [], [], [], [], None
    for stage in plan.stages:
        bypass = Bypass()
        if stage.cap is None:
            active, slots = rows, None
        else:
            number = len(decisions)
            ranked = SCORES[stage.score].rank(_sight(decoder, stage, rows, last, change, prompt, number, plan))
            with jax.named_scope("select"):
                keep = prompt.keep[number]
                if stage.share is not None:
                    keep = jnp.maximum(1, whole_share(stage.share, decisions[-1].selected.sum(axis=1)))
                chosen = _choose(ranked, rows, prompt, stage, number, keep)
                bypass = _bypass(stage, rows, chosen, prompt)
                decisions.append(decision_of(ranked.scores, chosen, rows, prompt, bypass))
                runs = bypass.running(chosen) | (rows.valid & (rows.visual < 0))
                slots = compact_slots(runs, prompt.text_slots + stage.cap + stage.proxies)
            if stage.action == "layout":
                rows = replace(rows, eligible=chosen)
            with jax.named_scope("gather"):
                # The keys that scoring computed are not those of proxies.
                active, keys = gather(bypass.entering(rows), slots), None if stage.proxies else ranked.keys
                if plan.position_mode == "renumber":
                    # And they are rotated by the old positions.
                    active, keys = replace(active, rope=_consecutive(active.valid, decoder.config)), None
                keys = None if keys is None else gather_keys(keys, slots)
            active, last, cached = run_layers(decoder, stage, active, keys, plan.bidirectional_layer, deepstack)
        finite.append(jnp.isfinite(take_rows(active.hidden, active.last[:, None])).all(axis=(1, 2)))
        compacted = plan.position_mode == "renumber" and stage.cap is not None
        next_position = active.last + 1 if compacted else prompt.next_position
        stages.append(StageCache.of(cached, decoder.config.kv_cache, active.last + 1, next_position))
        ran.append(active.slot)
        moved = hidden_change(last.hidden, last.output) if tracked else None
        with jax.named_scope("scatter"):
            if stage.action in (None, "delete"):
                rows, change = active, moved
            else:
                if plan.deepstack == "all":
                    rows = replace(rows, hidden=deepstack(rows.hidden, rows.slot, range(stage.lo, stage.hi)))
                rows = bypass.returned(rows, scatter(rows, slots, active))
                if tracked:
                    before = jnp.zeros(rows.valid.shape, jnp.float32) if change is None else change
                    change = bypass.untouched(before, put_rows(before, slots, moved))
    if plan.cut_caches != "no" and decisions:
        stages = cut(stages, ran, first_too=plan.cut_caches == "all")
    return Walked(active, jnp.stack(finite), KVCache(tuple(stages)), tuple(decisions))


def predicted(decoder: Decoder, walked: Walked) -> Prefilled:
    with jax.named_scope("head"):
        last = take_rows(walked.rows.hidden, walked.rows.last[:, None])[:, 0]
        return Prefilled(decoder.logits(last), walked.finite, walked.cache, walked.decisions)


def decode_step(
    decoder: Decoder, token: Int[Array, " B"], cache: KVCache, live: Bool[Array, " B"]
) -> tuple[Float[Array, "B vocab"], KVCache]:
    """Feed each row one token through all layers, each on its stage's cache. Of a row that is not `live` nothing is
    kept, and its logits mean nothing."""
    x = decoder.embed(token[:, None])
    layers, stages = iter(decoder.layers), []
    for stage in cache.stages:
        rope = rope_tables(stage.next_position[:, None], decoder.config)
        visible, keys, values = stage.visible, [], []
        for old_keys, old_values in zip(stage.keys, stage.values, strict=True):
            x, new_keys, new_values = next(layers).decode(x, rope, old_keys, old_values, stage.length, visible)
            keys.append(new_keys)
            values.append(new_values)
        stages.append(stage.advanced(tuple(keys), tuple(values), live))
    return decoder.logits(x[:, 0]), KVCache(tuple(stages))


def prompt_rows(
    decoder: Decoder,
    prompt: Prompt,
    features: Float[Array, "B F E"],
    anchors: Int[Array, "B F"],
    renumbered: bool = False,
) -> Rows:
    """A prompt at the decoder's input. renumbered: the positions of visual tokens stand in the prompt, too."""
    visual = prompt.feature >= 0
    index = jnp.where(visual, take_rows(anchors, prompt.feature), -1)
    embeds = decoder.embed(jnp.where(visual, 0, prompt.ids))
    own = take_rows(features[..., : embeds.shape[-1]], prompt.feature)
    hidden = jnp.where(visual[..., None], own.astype(embeds.dtype), embeds)
    return placed_rows(decoder, prompt, hidden, index, renumbered)


def placed_rows(
    decoder: Decoder, prompt: Prompt, hidden: Float[Array, "B T D"], index: Int[Array, "B T"], renumbered: bool
) -> Rows:
    """The rows of a prompt with these hidden states. index: of each visual slot, the token that it stands for among its
    row's original visual tokens."""
    visual, positions = prompt.feature >= 0, prompt.positions
    if not renumbered:
        # A merge decides on the device which original tokens, and so which positions, stand in the visual slots.
        of_visual = jnp.broadcast_to(jnp.where(visual, index, 0), prompt.positions.shape)
        found = jnp.take_along_axis(prompt.visual_positions, of_visual, axis=-1)
        positions = jnp.where(visual, found, prompt.positions)
    rope = rope_tables(positions, decoder.config)
    return Rows(
        hidden,
        rope,
        slot=jnp.where(prompt.valid, jnp.arange(visual.shape[1]), -1),
        visual=jnp.where(prompt.routed, index, -1),
        valid=prompt.valid,
        eligible=prompt.routed,
    )


def run_layers(
    decoder: Decoder, stage: StagePlan, rows: Rows, keys, bidirectional_layer: int | None, deepstack: Callable
) -> tuple[Rows, LastLayer | None, Cached]:
    """Run layers [lo, hi); returns the rows, what the next decision may read of the last layer (None without layers),
    and what each layer caches: keys, and values."""
    x = before = rows.hidden
    lengths = rows.valid.sum(axis=1)
    cached_keys, cached_values = [], []
    with jax.named_scope(f"layers_{stage.lo}_{stage.hi}"):
        for number in range(stage.lo, stage.hi):
            before = x
            # Rows are right-padded, so that the plain triangle hides padding from every valid row.
            mask = rows.valid[:, None] if number == bidirectional_layer else None
            x, k, v = decoder.layers[number].prefill(x, rows.rope, mask, keys if number == stage.lo else None, lengths)
            after, x = x, deepstack(x, rows.slot, range(number, number + 1))
            cached_keys.append(k)
            cached_values.append(v)
    last = LastLayer(before, after, v) if stage.lo < stage.hi else None
    return replace(rows, hidden=x), last, (tuple(cached_keys), tuple(cached_values))


def add_deepstack(
    feature: Int[Array, "B T"],
    features: Float[Array, "B F E"],
    hidden: Float[Array, "B C D"],
    slots: Int[Array, "B C"],
    layers: range,
) -> Float[Array, "B C D"]:
    """The outputs of `layers` with what DeepStack adds behind them: to each visual row the features of its own token.

    feature: of each slot of the prompt. slots: where the rows stood there, -1 for padding.
    """
    width = hidden.shape[-1]
    levels = [level for level in layers if level < features.shape[2] // width - 1]
    if not levels:
        return hidden
    with jax.named_scope("deepstack"):
        of_row = jnp.where(slots < 0, -1, take_rows(feature, slots))
        for level in levels:
            added = take_rows(features[..., (level + 1) * width : (level + 2) * width], of_row)
            hidden = hidden + jnp.where((of_row < 0)[..., None], 0, added.astype(hidden.dtype))
    return hidden


def _sight(
    decoder: Decoder, stage: StagePlan, rows: Rows, last: LastLayer | None, change, prompt: Prompt, number: int, plan
) -> Sight:
    return Sight(
        layers=decoder.layers,
        lo=stage.lo,
        rows=rows,
        last=last,
        change=change,
        prior=prompt.prior[number] if stage.score == "prior" else None,
        routed=prompt.routed,
        seeds=prompt.seeds[number] if SCORES[stage.score].has_seeds else None,
        seed_cap=stage.seed_cap,
        text_slots=prompt.text_slots,
        bidirectional_layer=plan.bidirectional_layer,
    )


def _choose(
    ranked: Ranked, rows: Rows, prompt: Prompt, stage: StagePlan, number: int, keep: Int[Array, " B"]
) -> Bool[Array, "B T"]:
    """The best rows, and those of the floor: inside the count (14.3) or on top of it."""
    floor = None
    if stage.floor:
        count = prompt.floor.shape[-1]
        floor = take_rows(jnp.asarray(prompt.floor[number]), jnp.where(rows.visual < 0, count, rows.visual))
    if stage.keeps_seeds:
        floor = floor | ranked.seeds
    return choose(ranked.scores, rows.eligible, keep, stage.cap, floor, stage.union)


def _consecutive(valid: Bool[Array, "B T"], config: DecoderConfig) -> Rope:
    """Position mode `renumber`: 0, 1, 2, ... over what is left, as the original PyramidDrop does."""
    return rope_tables(jnp.broadcast_to(jnp.arange(valid.shape[1]), valid.shape), config)


def _bypass(stage: StagePlan, rows: Rows, chosen: Bool[Array, "B T"], prompt: Prompt) -> Bypass:
    """What becomes of the candidates that were not chosen."""
    visual = prompt.routed.sum(axis=1)
    return REPAIRS[stage.repair].leave(rows, chosen, rows.eligible & ~chosen, visual, stage.proxies)


def decision_of(
    scores: Float[Array, "B T"], chosen: Bool[Array, "B T"], rows: Rows, prompt: Prompt, bypass: Bypass
) -> Decision:
    count = prompt.visual_positions.shape[-1]
    scores = jnp.where(rows.eligible, scores, -jnp.inf)
    by_index = (by_visual_index(values, rows.visual, count) for values in (scores, chosen))
    return Decision(*by_index, bypass.proxies(rows))
