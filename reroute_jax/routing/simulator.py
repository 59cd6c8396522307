"""Any schedule through programs that are compiled once: what a search, which asks thousands of them, needs.

The walker (`decoder.py`) compiles a program for every schedule. Here the parts of a stage are programs: its decision,
one layer on the rows that run, and their return. Their shapes depend on a limit out of `CAPS` alone, and which layer's
weights they take, what a decision keeps and what becomes of the rest are arguments. What they compute is the walker's
computation, with the walker's own layers, selection, repairs, gather and scatter.

What DeepStack adds reaches deferred tokens as well, as the schedule's `deepstack="all"` has it.

Behind each prompt stand tokens of an answer that are forced on it ("teacher forcing"). They run in every layer, and a
decision still ranks by the last token of the prompt. A batch without any can be decoded from (`prefill`).

Memory: hidden states before every layer in `kept`, `len(kept) * B * (T + A) * D` numbers, and the fewer are kept the
more layers a schedule runs that others ran as well. A prompt of LLaVA-1.5-7B with 16 forced tokens takes 5.5 MB a kept
layer in bf16, and 176 MB where all are kept (`bytes_kept`).

`masked` is the same as one function of arrays without a host's loop, for `vmap` and as a second opinion, but for
repairs: every layer runs on all rows. 64 prompts of the embedded models take 2.0 s so, and 0.3 to 1.4 s here (2 cores,
fp32, November 2026).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from reroute_jax.config import DecoderConfig
from reroute_jax.decoder import Decision, Decoder, Prefilled, Prompt, add_deepstack, decision_of, prompt_rows
from reroute_jax.engine.compilation import compiled
from reroute_jax.errors import RerouteError
from reroute_jax.nn.cache import ROOM, KVCache, StageCache, with_room
from reroute_jax.nn.layers import DecoderLayer, take_rows
from reroute_jax.routing.ops import Rows, compact_slots, gather, scatter, select
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.repair import REPAIRS, Bypass
from reroute_jax.routing.stages import ACTIONS, Stage
from reroute_jax.types import AnyArray

CAPS = (4, 8, 16, 24, 40, 64, 80, 128, 192, 320, 512, 768, 1280, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class Started:
    """A batch that any schedule can be run on.

    prompt: with the forced tokens in it. features: as of `decoder.walk`. rows: of all tokens at the decoder's input.
    hidden: their hidden states before the layers that are kept, 0 among them, while all tokens run. last: slot of each
    prompt's last token. final: behind all layers, that token's and the forced ones'. visual: tokens that decisions
    choose among.
    """

    decoder: Decoder
    prompt: Prompt
    features: Float[Array, "B F E"]
    rows: Rows
    hidden: dict[int, Float[Array, "B T D"]]
    last: Int[Array, " B"]
    final: Float[Array, "B A D"]
    visual: Int[np.ndarray, " B"]

    @property
    def forced(self) -> int:
        """Slots for forced tokens."""
        return self.final.shape[1] - 1

    @cached_property
    def caps(self) -> tuple[int, ...]:
        """Limits that programs are compiled for; the last one is all visual slots."""
        most = self.rows.valid.shape[1] - self.prompt.text_slots
        return (*(cap for cap in CAPS if cap < most), most)


@dataclass(frozen=True)
class Simulated:
    """final: hidden states behind all layers of the prompt's last token and the forced ones; `Decoder.logits` of
    them predict the first token and those behind the forced ones. decisions: as of the walker."""

    final: Float[Array, "B A D"]
    decisions: tuple[Decision, ...]


@jax.tree_util.register_dataclass
@dataclass
class RanLayer:
    """The rows that ran a layer, and its keys and values."""

    rows: Rows
    keys: Float[Array, "B K C H"]
    values: Float[Array, "B K C H"]


@jax.tree_util.register_dataclass
@dataclass
class Decided:
    """active: the rows that run. slots: theirs among all. left: all rows, where those that are gone are no longer valid
    and those that may not return are no longer eligible. bypass: what is done for tokens that wait."""

    active: Rows
    slots: Int[Array, "B C"]
    left: Rows
    bypass: Bypass
    decision: Decision


def forcing(prompt: Prompt, answers: Sequence[Sequence[int]], slots: int) -> Prompt:
    """The prompt with each row's answer behind its last token, `slots` of them more: they are text at the positions
    that decoding would give them. Host code. Raises RerouteError for an answer that is longer."""
    longest = max(map(len, answers), default=0)
    if longest > slots:
        raise RerouteError(f"an answer has {longest} tokens, expected at most the {slots} slots for forced ones")

    def longer(array: np.ndarray, fill: int | bool) -> np.ndarray:
        return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, slots)], constant_values=fill)

    ids, positions = longer(prompt.ids, 0), longer(prompt.positions, 0)
    valid = longer(prompt.valid, False)
    for row, answer in enumerate(answers):
        behind = slice(start := int(prompt.valid[row].sum()), start + len(answer))
        ids[row, behind], valid[row, behind] = answer, True
        positions[..., row, behind] = prompt.next_position[row] + np.arange(len(answer))
    return replace(
        prompt,
        ids=ids,
        positions=positions,
        valid=valid,
        feature=longer(prompt.feature, -1),
        routed=longer(prompt.routed, False),
        text_slots=prompt.text_slots + slots,
    )


def start(
    decoder: Decoder,
    prompt: Prompt,
    features: Float[Array, "B F E"],
    anchors: Int[Array, "B F"],
    answers: Sequence[Sequence[int]],
    slots: int,
    kept: Sequence[int] = (0,),
) -> Started:
    """Run all tokens of a batch. prompt, features, anchors: as of `decoder.walk`. answers, slots: as of `forcing`.
    kept: layers whose input is kept, 0 whether named or not."""
    last = jnp.asarray(prompt.valid.sum(axis=1) - 1, jnp.int32)
    longer = jax.tree.map(jnp.asarray, forcing(prompt, answers, slots))
    rows = _rows(decoder, longer, features, anchors)
    hidden, running = {0: rows.hidden}, rows
    for number in range(len(decoder.layers)):
        if number in kept:
            hidden[number] = running.hidden
        running = _run(decoder, number, running, longer, features).rows
    final = _behind_prompt(running.hidden, last, slots)
    return Started(decoder, longer, features, rows, hidden, last, final, prompt.routed.sum(axis=1))


def simulate(started: Started, schedule: Schedule) -> Simulated:
    """A batch under a schedule whose decisions rank by their own layer's attention of the last token, at original
    positions. Raises RerouteError for any other, and for one of another depth."""
    _check(started.decoder.config, schedule)
    if not schedule.decisions:
        return Simulated(started.final, ())
    lo = schedule.decisions[0].lo
    at = max(number for number in started.hidden if number <= lo)
    rows = replace(started.rows, hidden=started.hidden[at])
    for number in range(at, lo):
        rows = _run_next(started, number, rows).rows
    decisions = []
    for number, stage in enumerate(schedule.decisions):
        found = _decided(started, schedule, number, rows)
        decisions.append(found.decision)
        active = found.active
        for layer in range(stage.lo, stage.hi):
            active = _run_next(started, layer, active).rows
        rows = _returned(started, found, active, stage)
    return Simulated(_behind_prompt(rows.hidden, started.last, started.forced), tuple(decisions))


def prefill(started: Started, schedule: Schedule) -> Prefilled:
    """As `decoder.prefill`, of a batch without forced tokens; errors as of `simulate`. Every layer's cache has slots
    for all tokens, so that one program decodes from any schedule."""
    _check(started.decoder.config, schedule)
    rows, stages, decisions, finite = started.rows, [], [], []
    for stage in schedule.stages:
        found = _decided(started, schedule, len(decisions), rows) if stage.decides else None
        active = rows if found is None else found.active
        for layer in range(stage.lo, stage.hi):
            ran = _run_next(started, layer, active)
            active = ran.rows
            stages.append(_cache(ran, started.prompt.next_position, started.rows.valid.shape[1] + ROOM))
        if found is None:
            rows = active
        else:
            rows = _returned(started, found, active, stage)
            decisions.append(found.decision)
        finite.append(jnp.isfinite(take_rows(rows.hidden, started.last[:, None])).all(axis=(1, 2)))
    logits = _logits(started.decoder, _behind_prompt(rows.hidden, started.last, 0))[:, 0]
    return Prefilled(logits, jnp.stack(finite), KVCache(tuple(stages)), tuple(decisions))


def bytes_kept(config: DecoderConfig, kept: int, prompts: int, slots: int, itemsize: int) -> int:
    """Bytes of the hidden states that `start` keeps before `kept` layers of prompts with `slots` slots, forced tokens
    included."""
    return kept * prompts * slots * config.hidden_size * itemsize


# --- The same as one function of arrays -------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass
class ScheduleArrays:
    """A schedule by decoder layer. decide: whether there is a decision at the layer's input; keep: tokens it selects of
    each row; action: index in `stages.ACTIONS` of what becomes of the others."""

    decide: Bool[AnyArray, " L"]
    keep: Int[AnyArray, "L B"]
    action: Int[AnyArray, " L"]


def schedule_arrays(schedule: Schedule, visual: Int[np.ndarray, " B"]) -> ScheduleArrays:
    """Of rows with so many visual tokens at the decoder's input. Raises RerouteError for a schedule with
    repairs, and as `simulate`."""
    repairs = [f"repair={stage.repair!r}" for stage in schedule.decisions[:-1] if stage.repair is not None]
    _check_known([*obstacles(schedule), *repairs])
    layers = [stage.lo for stage in schedule.decisions]
    depth = schedule.num_layers
    arrays = ScheduleArrays(np.zeros(depth, bool), np.zeros((depth, len(visual)), np.int32), np.zeros(depth, np.int32))
    arrays.decide[layers], arrays.keep[layers] = True, schedule.keep_counts(visual)
    arrays.action[layers] = [ACTIONS.index(stage.action) for stage in schedule.decisions]
    return arrays


def masked(
    decoder: Decoder,
    rows: Rows,
    last: Int[Array, " B"],
    feature: Int[Array, "B T"],
    features: Float[Array, "B F E"],
    schedule: ScheduleArrays,
) -> tuple[Float[Array, "B T D"], Bool[Array, "L B T"]]:
    """Hidden states behind all layers, and what each layer's decision selected. rows, last, features: as of `Started`;
    feature: as of its prompt.

    Every layer runs on all rows; those that are not to run are hidden from the others and keep what they had.
    """
    x, text = rows.hidden, rows.valid & (rows.visual < 0)
    present, eligible, active, selected = rows.valid, rows.eligible, rows.valid, []
    triangle = jnp.tri(x.shape[1], dtype=bool)
    for number, layer in enumerate(decoder.layers):
        decide, action = schedule.decide[number], schedule.action[number]
        scores = _scores(layer, replace(rows, hidden=x, valid=present), last)
        chosen = select(scores, eligible, schedule.keep[number], x.shape[1])
        active = jnp.where(decide, chosen | text, active)
        eligible = jnp.where(decide & (action != ACTIONS.index("reroute")), chosen, eligible)
        present = jnp.where(decide & (action == ACTIONS.index("delete")), chosen | text, present)
        ran, _, _ = layer.prefill(x, rows.rope, active[:, None] & triangle)
        x = jnp.where(active[..., None], ran, x)
        x = add_deepstack(feature, features, x, rows.slot, range(number, number + 1))
        selected.append(chosen & decide)
    return x, jnp.stack(selected)


# --- The programs -----------------------------------------------------------------------------------------------------


@compiled()
def _rows(decoder: Decoder, prompt: Prompt, features: Float[Array, "B F E"], anchors: Int[Array, "B F"]) -> Rows:
    return prompt_rows(decoder, prompt, features, anchors)


@compiled()
def _run_layer(layer: DecoderLayer, rows: Rows) -> RanLayer:
    hidden, keys, values = layer.prefill(rows.hidden, rows.rope, None, None, rows.valid.sum(axis=1))
    return RanLayer(replace(rows, hidden=hidden), keys, values)


@compiled(static_argnames=("cap", "repair", "proxies"))
def _decide(
    layer: DecoderLayer,
    rows: Rows,
    last: Int[Array, " B"],
    keep: Int[Array, " B"],
    action: Int[Array, ""],
    prompt: Prompt,
    cap: int,
    repair: str | None,
    proxies: int,
) -> Decided:
    scores = _scores(layer, rows, last)
    chosen = select(scores, rows.eligible, keep, cap)
    visual, waiting = prompt.routed.sum(axis=1), rows.eligible & ~chosen
    bypass = REPAIRS[repair].leave(rows, chosen, waiting, visual, proxies)
    runs = bypass.running(chosen) | (rows.valid & (rows.visual < 0))
    slots = compact_slots(runs, min(runs.shape[1], prompt.text_slots + cap + proxies))
    valid = jnp.where(action == ACTIONS.index("delete"), runs, rows.valid)
    eligible = jnp.where(action == ACTIONS.index("reroute"), rows.eligible, chosen)
    left = replace(rows, valid=valid, eligible=eligible)
    decision = decision_of(scores, chosen, rows, prompt, bypass)
    return Decided(gather(bypass.entering(rows), slots), slots, left, bypass, decision)


@compiled(static_argnames="layers")
def _added(rows: Rows, feature: Int[Array, "B T"], features: Float[Array, "B F E"], layers: range) -> Rows:
    return replace(rows, hidden=add_deepstack(feature, features, rows.hidden, rows.slot, layers))


@compiled()
def _return(rows: Rows, slots: Int[Array, "B C"], active: Rows, bypass: Bypass) -> Rows:
    return bypass.returned(rows, scatter(rows, slots, active))


@compiled(static_argnames="slots")
def _behind_prompt(hidden: Float[Array, "B T D"], last: Int[Array, " B"], slots: int) -> Float[Array, "B A D"]:
    return take_rows(hidden, last[:, None] + jnp.arange(slots + 1))


@compiled()
def _logits(decoder: Decoder, final: Float[Array, "B A D"]) -> Float[Array, "B A vocab"]:
    return decoder.logits(final)


@compiled(static_argnames="slots")
def _cache(ran: RanLayer, next_position: Int[Array, " B"], slots: int) -> StageCache:
    more = slots - ran.rows.valid.shape[1]
    keys, values = ((with_room(array, more),) for array in (ran.keys, ran.values))
    return StageCache(keys, values, length=ran.rows.last + 1, next_position=next_position)


def _scores(layer: DecoderLayer, rows: Rows, last: Int[Array, " B"]) -> Float[Array, "B T"]:
    """Attention of each prompt's last token over the valid rows up to it, mean over heads."""
    mask = rows.valid & (jnp.arange(rows.valid.shape[1]) <= last[:, None])
    probabilities, _ = layer.probabilities(rows.hidden, rows.rope, last[:, None], mask[:, None])
    return probabilities.mean(axis=(1, 2))


# --- Inside -----------------------------------------------------------------------------------------------------------


def _run(decoder: Decoder, number: int, rows: Rows, prompt: Prompt, features: Float[Array, "B F E"]) -> RanLayer:
    """A layer on these rows, and what DeepStack adds behind it."""
    ran, behind = _run_layer(decoder.layers[number], rows), _deepstack_layers(decoder, number, number + 1)
    return replace(ran, rows=_added(ran.rows, prompt.feature, features, layers=behind)) if behind else ran


def _run_next(started: Started, number: int, rows: Rows) -> RanLayer:
    return _run(started.decoder, number, rows, started.prompt, started.features)


def _returned(started: Started, found: Decided, active: Rows, stage: Stage) -> Rows:
    """All rows behind a stage; deferred ones get what DeepStack adds inside it."""
    left, inside = found.left, _deepstack_layers(started.decoder, stage.lo, stage.hi)
    if inside:
        left = _added(left, started.prompt.feature, started.features, layers=inside)
    return _return(left, found.slots, active, found.bypass)


def _deepstack_layers(decoder: Decoder, lo: int, hi: int) -> range:
    """Those of the layers behind which DeepStack adds features."""
    return range(lo, min(hi, decoder.config.deepstack))


def _decided(started: Started, schedule: Schedule, number: int, rows: Rows) -> Decided:
    stage, keep = schedule.decisions[number], schedule.keep_counts(started.visual)[number]
    cap = next(cap for cap in started.caps if cap >= keep.max(initial=0))
    action, layer = np.int32(ACTIONS.index(stage.action)), started.decoder.layers[stage.lo]
    repair = None if number == len(schedule.decisions) - 1 else stage.repair
    visual = int(started.visual.max(initial=0))
    proxies = REPAIRS[repair].proxies(visual, visual)
    return _decide(layer, rows, started.last, keep, action, started.prompt, cap=cap, repair=repair, proxies=proxies)


def _check(config: DecoderConfig, schedule: Schedule) -> None:
    schedule.check_depth(config.num_layers)
    if config.kv_cache is not None:
        raise RerouteError("forced tokens read no KV cache: load the model without kv_cache to simulate schedules")
    _check_known(obstacles(schedule))


def _check_known(unlike: Sequence[str]) -> None:
    if unlike:
        raise RerouteError(f"a schedule with {unlike[0]} cannot be simulated: run it with the model's `answer`")


def obstacles(schedule: Schedule) -> list[str]:
    """What of a schedule the simulator does not know."""
    unlike = [f"score={stage.score!r}" for stage in schedule.decisions if stage.score != "last_token"]
    if schedule.position_mode != "original":
        unlike.append(f"position_mode={schedule.position_mode!r}")
    if schedule.bidirectional_layer is not None:
        unlike.append(f"bidirectional_layer={schedule.bidirectional_layer}")
    if schedule.deepstack == "running":
        unlike.append("deepstack='running'")
    if schedule.cut_caches != "no":
        unlike.append(f"cut_caches={schedule.cut_caches!r}")
    if schedule.has_floor:
        unlike.append("a floor")
    return unlike
