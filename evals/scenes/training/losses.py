"""Training objectives of the embedded models.

Besides next-token prediction, auxiliary heads that are thrown away after training. For all families: what each visual
token shows. For LLaVA and Qwen2.5-VL: half way up the decoder, which visual tokens the last prompt token refers to. For
LLaVA and Qwen3-VL: where the box of a token's object is. For LLaVA: what the class token saw (Nuwa ranks by its
attention). The Qwen towers have no class token: their last block, by which Nuwa ranks, learns to attend to objects.
Qwen2.5-VL's knows no absolute positions: it learns how far a token's object reaches, and the decoder's first layers
learn where in the image each token is. Qwen3-VL's tokens are read as the sum of their features and of all that
DeepStack adds.
Letters: R scenes, Q questions, W slots, P visual tokens, S prefix slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from evals.scenes.tokenizer import DIALECTS, vocabulary
from evals.scenes.training.packing import ImagePrefix, Packed, blurred, coordinate_starts
from evals.scenes.training.towers import TowerStates, Trained
from evals.scenes.world import COLOURS, GRIDS, RADII, SHAPES, SIZES, TOKEN
from reroute_jax.nn.layers import DecoderLayer, Linear, Rope, rotate
from reroute_jax.nn.positions import rope_tables

# Decoder layers whose output carries the pointer objective.
POINTER_LAYERS = {"llava": (5, 8), "qwen2_5_vl": (5, 8), "qwen3_vl": ()}
PLACE_LAYER, CORNER_LAYER = 1, 3  # Qwen2.5-VL: of the row and column of a token, and of the box of its object
REACH = 2 * RADII["big"][1] + 1  # pixels from a point of an object to its sides, 0 included
KINDS = (len(SHAPES), len(COLOURS), len(SIZES))
CELLS = max(max(grid) for grid in GRIDS["qwen2_5_vl"])  # rows, and columns, of the largest images
ATTENTION_SHARE = 0.3


class AuxiliaryHeads(nnx.Module):
    def __init__(self, family: str, vision: int, decoder: int, *, rngs: nnx.Rngs):
        keep = {"bias": True, "rngs": rngs, "dtype": jnp.float32}
        self.object = Linear(decoder, 1, ("embed", "mlp"), **keep)
        self.corners = Linear(decoder, 4 * decoder, ("embed", "mlp"), **keep)
        if family == "llava":
            self.presence = Linear(vision, sum(KINDS), ("embed", "mlp"), **keep)
        if family == "qwen2_5_vl":
            self.reach = Linear(decoder, 4 * REACH, ("embed", "mlp"), **keep)
            self.kinds = Linear(decoder, sum(KINDS), ("embed", "mlp"), **keep)
            self.place = Linear(decoder, 2 * CELLS, ("embed", "mlp"), **keep)
        pointers = POINTER_LAYERS[family]
        self.asking = nnx.List([Linear(decoder, decoder, ("embed", "mlp"), **keep) for _ in pointers])
        self.asked = nnx.List([Linear(decoder, decoder, ("embed", "mlp"), **keep) for _ in pointers])


@dataclass(frozen=True)
class Targets:
    """Token ids that objectives refer to: words of each attribute in label order, first id of each coordinate form;
    the slot of the first image token, the numbers a coordinate can be, and how many make one unit of a box."""

    words: tuple[tuple[int, ...], ...]
    coordinates: tuple[int, ...]
    first_image: int
    numbers: int
    density: float


def targets(family: str) -> Targets:
    vocab, dialect = vocabulary(family), DIALECTS[family]
    words = tuple(tuple(vocab[word] for word in group) for group in (SHAPES, COLOURS, SIZES))
    starts = tuple(coordinate_starts(family))
    return Targets(words, starts, len(dialect.opening), len(dialect.numbers), dialect.density)


def dense_loss(model: Trained, heads: AuxiliaryHeads, seen: TowerStates, batch: Packed, targets: Targets, soft):
    """Per-token objectness and attributes against the decoder's word embeddings, and the family's own objectives.
    Returns (loss, accuracies of shape, colour, size)."""
    thing, real = batch.patch_thing, _real(batch.prefix, targets, batch.patch_thing.shape[1])
    on = thing >= 0
    normed = _normed(sum(seen.deepstack, seen.features))
    objectness = _mean(_binary(heads.object(normed)[..., 0], on), real)
    label = jnp.take_along_axis(batch.attributes, jnp.maximum(thing, 0)[..., None], axis=1)
    losses, accuracies = [], []
    for column, ids in enumerate(targets.words):
        logits = normed @ model.decoder.embed.table[jnp.array(ids)].T
        losses.append(_mean(_cross_entropy(logits, jax.nn.one_hot(label[..., column], len(ids))), on))
        accuracies.append(_mean(logits.argmax(-1) == label[..., column], on))
    if model.config.family == "qwen2_5_vl":
        where = _reach_loss(heads, normed, batch, targets)
    else:
        where = _corners_loss(model, heads, normed, batch, targets, soft)
    if model.config.family == "llava":
        ranked = _presence_loss(heads, seen.states, batch)
    else:
        ranked = _attention_loss(seen.received, on, real)
    return objectness + sum(losses) + where + ranked, jnp.stack(accuracies)


def _corners_loss(model, heads: AuxiliaryHeads, x, batch: Packed, targets: Targets, soft) -> Float[Array, ""]:
    """Box corners of the object of each visual token, read off `x [R, P, D]` against the decoder's output rows."""
    boxes, on = _own_boxes(batch), batch.patch_thing >= 0
    read = heads.corners(x).reshape(*x.shape[:2], 4, -1)
    losses = []
    for corner, first in enumerate(targets.coordinates):
        rows = jax.lax.dynamic_slice_in_dim(model.decoder.head.kernel[...], first, targets.numbers)
        bins = jnp.round(boxes[..., corner] * targets.density).astype(jnp.int32)
        wanted = soft[first + bins][..., first : first + targets.numbers]
        losses.append(0.5 * _mean(_cross_entropy(read[:, :, corner] @ rows.T, wanted), on))
    return sum(losses)


def _presence_loss(heads: AuxiliaryHeads, states, batch: Packed) -> Float[Array, ""]:
    """Which shapes, colours and sizes the scene holds, read off the class token after the last two blocks."""
    present = jnp.concatenate([_present(batch.attributes[..., c], n) for c, n in enumerate(KINDS)], -1)
    return sum(_binary(heads.presence(state[:, 0]), present).mean() for state in states[-2:])


def _reach_loss(heads: AuxiliaryHeads, normed, batch: Packed, targets: Targets) -> Float[Array, ""]:
    """Pixels from the middle of each visual token to the sides of its object, as classes."""
    row, col = _cells(batch, targets)
    middle = (jnp.stack([col, row, col, row], axis=-1) + 0.5) * TOKEN
    bins = jnp.abs(_own_boxes(batch) - middle).astype(jnp.int32)
    read = heads.reach(normed).reshape(*normed.shape[:2], 4, REACH)
    wanted = jnp.asarray(blurred(REACH), jnp.float32)[bins]
    return 0.5 * 4 * _mean(_cross_entropy(read, wanted).mean(-1), batch.patch_thing >= 0)


def _kinds_loss(heads: AuxiliaryHeads, x, batch: Packed) -> Float[Array, ""]:
    """Shape, colour and size of the object of each visual token, which its place must not drown."""
    label = jnp.take_along_axis(batch.attributes, jnp.maximum(batch.patch_thing, 0)[..., None], axis=1)
    logits = jnp.split(heads.kinds(x), np.cumsum(KINDS)[:-1], axis=-1)
    losses = [
        _cross_entropy(part, jax.nn.one_hot(label[..., c], n))
        for c, (part, n) in enumerate(zip(logits, KINDS, strict=True))
    ]
    return _mean(sum(losses), batch.patch_thing >= 0)


def _attention_loss(received: Float[Array, "R P"], on: Bool[Array, "R P"], real: Bool[Array, "R P"]):
    """Share of the last block's attention that objects receive."""
    share = (received * on).sum(axis=1) / (received * real).sum(axis=1)
    return -ATTENTION_SHARE * jnp.log(share).mean()


def _place_loss(heads: AuxiliaryHeads, x, batch: Packed, targets: Targets) -> Float[Array, ""]:
    """Row and column of each visual token, read off a decoder layer."""
    real = _real(batch.prefix, targets, x.shape[1])
    read = heads.place(x).reshape(*x.shape[:2], 2, CELLS)
    wanted = jax.nn.one_hot(jnp.stack(_cells(batch, targets), axis=-1), CELLS)
    return _mean(_cross_entropy(read, wanted).mean(-1), real)


def _cells(batch: Packed, targets: Targets) -> tuple[Int[Array, "R P"], Int[Array, "R P"]]:
    """Row and column of every image slot of an M-RoPE prefix; nonsense at padding."""
    first, count = targets.first_image, batch.patch_thing.shape[1]
    _, row, col = jnp.moveaxis(batch.prefix.position[:, :, first : first + count] - first, 1, 0)
    return row, col


def _own_boxes(batch: Packed) -> Float[Array, "R P 4"]:
    return jnp.take_along_axis(batch.boxes, jnp.maximum(batch.patch_thing, 0)[..., None], axis=1)


def _real(prefix: ImagePrefix, targets: Targets, count: int) -> Bool[Array, "R P"]:
    return prefix.runs[:, targets.first_image : targets.first_image + count]


def answer_loss(
    model: Trained,
    heads: AuxiliaryHeads,
    seen: TowerStates,
    batch: Packed,
    bypass: Bool[Array, "L R P"],
    targets: Targets,
    soft,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""], Int[Array, "R Q W"]]:
    """(next-token loss, pointer loss, loss of place and corners in the decoder, most likely token of every slot).

    bypass: visual tokens that skip a decoder layer on the residual stream.
    """
    decoder, shown = model.decoder, slice(targets.first_image, targets.first_image + seen.features.shape[1])
    scenes, asked, slots = batch.ids.shape
    prefix = decoder.embed(batch.prefix.ids).at[:, shown].set(seen.features)
    x = decoder.embed(batch.ids.reshape(scenes, -1))
    ropes = _ropes(decoder.config, batch)
    pointing, pointers, places = POINTER_LAYERS[model.config.family], [], []
    for number, layer in enumerate(decoder.layers):
        runs = batch.prefix.runs.at[:, shown].set(batch.prefix.runs[:, shown] & ~bypass[number])
        prefix, x = shared_prefix_layer(layer, prefix, x, ropes, runs, asked)
        if number < len(seen.deepstack):
            prefix = prefix.at[:, shown].add(seen.deepstack[number])
        if number in pointing:
            head = pointing.index(number)
            pointers.append(_pointer(heads.asking[head], heads.asked[head], prefix, x, batch, targets))
        if model.config.family == "qwen2_5_vl" and number in (PLACE_LAYER, CORNER_LAYER):
            normed = _normed(prefix[:, shown])
            if number == PLACE_LAYER:
                places.append(_place_loss(heads, normed, batch, targets))
            else:
                corners = _corners_loss(model, heads, normed, batch, targets, soft)
                places.append(corners + _kinds_loss(heads, normed, batch))
    logits = decoder.logits(x).reshape(scenes, asked, slots, -1)
    losses = _cross_entropy(logits, soft[batch.label]) * batch.weight
    answer = losses.sum() / batch.weight.sum()
    return answer, jnp.asarray(sum(pointers)), jnp.asarray(sum(places)), logits.argmax(-1)


def _ropes(config, batch: Packed) -> tuple[Rope, Rope]:
    """Of the prefix and of the questions, whose positions go on from it, the same on every axis."""
    position, start = jnp.swapaxes(batch.prefix.position, 0, 1), batch.prefix.start
    _, asked, slots = batch.ids.shape
    behind = start[:, None] + jnp.tile(jnp.arange(slots), asked)
    if len(position) == 1:
        return rope_tables(position[0], config), rope_tables(behind, config)
    questions = jnp.broadcast_to(behind, (len(position), *behind.shape))
    return rope_tables(position, config), rope_tables(questions, config)


def shared_prefix_layer(layer: DecoderLayer, prefix, x, ropes: tuple[Rope, Rope], runs: Bool[Array, "R S"], asked: int):
    """One decoder layer on an image prefix `[R, S, D]` and the questions behind it `[R, Q*W, D]`, each of which sees
    the prefix and itself. Prefix slots that do not run are neither read nor changed."""
    causal = jnp.tril(jnp.ones((prefix.shape[1],) * 2, bool)) & runs[:, None]
    passed, k_prefix, v_prefix = layer.prefill(prefix, ropes[0], causal)
    normed = layer.attn_norm(x)
    q = rotate(layer.attn.queries(normed), ropes[1]) * layer.attn.q.kernel.shape[1] ** -0.5
    k, v = rotate(layer.attn.keys(normed), ropes[1]), layer.attn.v(normed)
    group = q.shape[1] // k.shape[1]
    k_prefix, v_prefix, k, v = (jnp.repeat(heads, group, axis=1) for heads in (k_prefix, v_prefix, k, v))
    apart = (*q.shape[:2], asked, -1, q.shape[-1])
    seen = jnp.einsum("RNTH,RNSH->RNTS", q, k_prefix) + jnp.where(runs, 0.0, -1e9)[:, None, None]
    own = jnp.einsum("RNQWH,RNQUH->RNQWU", q.reshape(apart), k.reshape(apart))
    own = own + jnp.where(jnp.tril(jnp.ones(own.shape[-2:], bool)), 0.0, -1e9)
    own_flat = own.reshape(*q.shape[:3], -1)
    weights = jax.nn.softmax(jnp.concatenate([seen, own_flat], axis=-1), axis=-1)
    to_prefix, to_own = weights[..., : prefix.shape[1]], weights[..., prefix.shape[1] :].reshape(own.shape)
    read = jnp.einsum("RNQWU,RNQUH->RNQWH", to_own, v.reshape(apart)).reshape(q.shape)
    x = x + layer.attn.o(jnp.einsum("RNTS,RNSH->RNTH", to_prefix, v_prefix) + read)
    x = x + layer.mlp(layer.mlp_norm(x))
    return jnp.where(runs[..., None], passed, prefix), x


def _pointer(asking: Linear, asked: Linear, prefix, x, batch: Packed, targets: Targets) -> Float[Array, ""]:
    """Cross-entropy of the last prompt token's match against the tokens of the objects the question is about, or
    against the first token of all where it is about none."""
    count = batch.patch_thing.shape[1]
    questions = jnp.take_along_axis(x.reshape(*batch.ids.shape, -1), batch.ask[..., None, None], axis=2)[:, :, 0]
    shown = slice(targets.first_image, targets.first_image + count)
    places = jnp.concatenate([prefix[:, :1], prefix[:, shown]], axis=1)
    logits = jnp.einsum("RQD,RPD->RQP", asking(questions), asked(places)) / x.shape[-1] ** 0.5
    real = jnp.concatenate([batch.prefix.runs[:, :1], batch.prefix.runs[:, shown]], axis=1)
    logits = logits + jnp.where(real, 0.0, -1e9)[:, None]
    objects = batch.subjects.shape[-1]
    thing = jnp.concatenate([jnp.full_like(batch.patch_thing[:, :1], objects - 1), batch.patch_thing], axis=1)
    wanted = jnp.einsum("RQO,RPO->RQP", batch.subjects.astype(jnp.float32), jax.nn.one_hot(thing, objects))
    wanted = wanted / jnp.maximum(wanted.sum(-1, keepdims=True), 1)
    return _mean(_cross_entropy(logits, wanted), batch.weight.sum(axis=-1) > 0)


def _normed(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def _cross_entropy(logits, wanted):
    return -(wanted * jax.nn.log_softmax(logits, axis=-1)).sum(axis=-1)


def _binary(logits, wanted):
    return jax.nn.softplus(logits) - logits * wanted


def _mean(values, where):
    return (values * where).sum() / jnp.maximum(where.sum(), 1)


def _present(labels: Int[Array, "R O"], classes: int) -> Float[Array, "R classes"]:
    return jax.nn.one_hot(labels, classes).max(axis=1)
