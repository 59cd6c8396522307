"""What prompts share that begin alike, up to their last image: the layers before the first decision.

Under the causal mask nothing there has seen what stands behind. So these layers run a prefix once (`run_prefix`), and
every prompt that begins with it goes on from what they left (`prefill_behind`), with decisions of its own.

Letters: P slots for a prefix, T for a whole prompt, S for what stands behind the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from reroute_jax.decoder import (
    Decoder,
    Prefilled,
    Prompt,
    add_deepstack,
    decide,
    placed_rows,
    predicted,
    prompt_rows,
    run_layers,
)
from reroute_jax.errors import RerouteError
from reroute_jax.nn.cache import Cached
from reroute_jax.nn.layers import Rope, take_rows
from reroute_jax.routing.ops import Rows, put_rows
from reroute_jax.routing.scores import SCORES, LastLayer
from reroute_jax.routing.static_plan import RoutingPlan, StagePlan


@dataclass(frozen=True)
class Opening:
    """What of a plan its prefixes depend on, and which states of theirs it needs later. Static.

    layers: before the first decision. decides: whether there is one. reads_last: whether it reads the layer before it.
    adds_features: whether layers behind it add image features (DeepStack). renumbers_input: as of a `RoutingPlan`.
    """

    layers: int
    decides: bool
    reads_last: bool
    adds_features: bool
    renumbers_input: bool

    @classmethod
    def of(cls, plan: RoutingPlan, deepstack: int) -> Opening:
        """deepstack: layers that add image features, the first ones. Raises RerouteError where a prefix sees what
        stands behind it."""
        layers = plan.undecided
        if plan.bidirectional_layer is not None and plan.bidirectional_layer < layers:
            raise RerouteError(
                f"layer {plan.bidirectional_layer} runs without the causal mask before the first decision, so that "
                "what it leaves of an image depends on the question: leave out the image cache, or that switch"
            )
        scores = [SCORES[stage.score] for stage in plan.stages if stage.cap is not None]
        return cls(
            layers,
            decides=bool(scores),
            reads_last=any(score.previous for score in scores[:1]) or any(score.reads_change for score in scores),
            adds_features=bool(scores) and layers < deepstack,
            renumbers_input=plan.renumbers_input,
        )


@jax.tree_util.register_dataclass
@dataclass
class PrefixStates:
    """What the layers before the first decision leave of prefixes; None is what no later layer reads.

    keys, values: of each of these layers. hidden: behind them. last: input and output of the last of them, as of
    `LastLayer`. features: image features of each visual slot.
    """

    keys: tuple[Float[Array, "B K P H"], ...]
    values: tuple[Float[Array, "B K P H"], ...]
    hidden: Float[Array, "B P D"] | None
    last: tuple[Float[Array, "B P D"], Float[Array, "B P D"]] | None
    features: Float[Array, "B P E"] | None

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in jax.tree.leaves(self))


def run_prefix(
    decoder: Decoder, prompt: Prompt, features: Float[Array, "B F E"], anchors: Int[Array, "B F"], opening: Opening
) -> tuple[PrefixStates, ...]:
    """Of prompts that are prefixes of others, up to their last image; of each row by itself. features, anchors: as of
    `decoder.walk`."""
    with jax.named_scope("embedding"):
        rows = prompt_rows(decoder, prompt, features, anchors, opening.renumbers_input)
    layers, deepstack = StagePlan(0, opening.layers, None, None, None), partial(add_deepstack, prompt.feature, features)
    rows, last, (keys, values) = run_layers(decoder, layers, rows, None, None, deepstack)
    states = PrefixStates(
        keys,
        values,
        hidden=rows.hidden if opening.decides else None,
        last=(last.hidden, last.output) if opening.reads_last else None,
        features=take_rows(features, prompt.feature) if opening.adds_features else None,
    )
    return tuple(jax.tree.map(itemgetter(slice(row, row + 1)), states) for row in range(len(prompt.ids)))


def prefill_behind(
    decoder: Decoder,
    prompt: Prompt,
    prefixes: Sequence[PrefixStates],
    starts: Int[Array, " B"],
    index: Int[Array, "B T"],
    plan: RoutingPlan,
    size: int,
) -> Prefilled:
    """`decoder.prefill` of prompts whose prefixes ran already, each by itself.

    starts: where what stands behind the prefixes begins. index: of each visual slot, the token that it stands for among
    its row's original visual tokens. size: static, slots for what stands behind.
    """
    states = _joined(prefixes, prompt.ids.shape[1])
    with jax.named_scope("embedding"):
        slots = starts[:, None] + jnp.arange(size)
        behind = decoder.embed(take_rows(jnp.asarray(prompt.ids), slots))
        nothing = jnp.zeros((*prompt.ids.shape, behind.shape[-1]), behind.dtype)
        rows = placed_rows(
            decoder, prompt, nothing if states.hidden is None else states.hidden, index, plan.renumbers_input
        )
    opened = _extended(decoder, states, rows, behind, slots)
    by_slot = jnp.where(prompt.feature < 0, -1, jnp.arange(prompt.ids.shape[1]))
    deepstack = _add_nothing if states.features is None else partial(add_deepstack, by_slot, states.features)
    return predicted(decoder, decide(decoder, prompt, plan, deepstack, *opened))


def _joined(prefixes: Sequence[PrefixStates], slots: int) -> PrefixStates:
    """A batch of them, in so many slots each."""

    def fitted(array: Array) -> Array:
        missing = [(0, 0)] * array.ndim
        missing[-2] = (0, max(0, slots - array.shape[-2]))
        return jnp.pad(array[..., :slots, :], missing)

    return jax.tree.map(lambda *rows: jnp.concatenate([fitted(row) for row in rows]), *prefixes)


def _extended(
    decoder: Decoder, states: PrefixStates, rows: Rows, behind: Float[Array, "B S D"], slots: Int[Array, "B S"]
) -> tuple[Rows, LastLayer | None, Cached]:
    """As `decoder.run_layers` of all layers before the first decision; only `behind` runs.

    rows: of the prompts, the prefixes' hidden states in place. slots: of what is behind, out of range for padding.
    """
    x = before = behind
    rope = Rope(*(take_rows(table, slots) for table in rows.rope))
    visible = jnp.arange(rows.valid.shape[1]) <= slots[..., None]
    cached_keys, cached_values = [], []
    with jax.named_scope(f"layers_0_{len(states.keys)}"):
        for number, of_prefix in enumerate(zip(states.keys, states.values, strict=True)):
            before = x
            x, keys, values = decoder.layers[number].extend(x, rope, *of_prefix, slots, visible)
            cached_keys.append(keys)
            cached_values.append(values)
    last = None
    if states.last is not None:
        hidden, output = (put_rows(old, slots, new) for old, new in zip(states.last, (before, x), strict=True))
        last = LastLayer(hidden, output, values)
    return replace(rows, hidden=put_rows(rows.hidden, slots, x)), last, (tuple(cached_keys), tuple(cached_values))


def _add_nothing(hidden: Float[Array, "B C D"], slots: Int[Array, "B C"], layers: range) -> Float[Array, "B C D"]:
    """DeepStack where no layer adds anything any more."""
    return hidden
