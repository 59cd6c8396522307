"""Training objectives of the embedded models.

Besides next-token prediction, four auxiliary heads that are thrown away after training: what each patch shows, what
the class token saw (Nuwa ranks by its attention), where the box of a patch's object is, and, half way up the decoder,
which patches the last prompt token refers to. Letters: R scenes, Q questions, W slots, P patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from evals.scenes.packing import PREFIX, Packed, prefix_ids
from evals.scenes.tokenizer import BINS
from reroute_jax.layers import DecoderLayer, Linear, Rope, rotate
from reroute_jax.models.llava import Llava
from reroute_jax.positions import rope_tables
from reroute_jax.vision.clip import ClipTower

POINTER_LAYERS = (5, 8)  # decoder layers whose output carries the pointer objective
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class AuxiliaryHeads(nnx.Module):
    def __init__(self, vision: int, decoder: int, kinds: int, *, rngs: nnx.Rngs):
        keep = {"bias": True, "rngs": rngs, "dtype": jnp.float32}
        self.object = Linear(decoder, 1, ("embed", "mlp"), **keep)
        self.corners = Linear(decoder, 4 * decoder, ("embed", "mlp"), **keep)
        self.presence = Linear(vision, kinds, ("embed", "mlp"), **keep)
        self.asking = nnx.List([Linear(decoder, decoder, ("embed", "mlp"), **keep) for _ in POINTER_LAYERS])
        self.asked = nnx.List([Linear(decoder, decoder, ("embed", "mlp"), **keep) for _ in POINTER_LAYERS])


@dataclass(frozen=True)
class Targets:
    """Token ids that objectives refer to: words of each attribute in label order, first id of each coordinate form."""

    words: tuple[tuple[int, ...], ...]
    coordinates: tuple[int, ...]


def pixels(images: UInt8[Array, "R height width 3"]) -> Float[Array, "R 3 height width"]:
    """As the CLIP image processor makes them."""
    scaled = (images.astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)
    return scaled.transpose(0, 3, 1, 2)


def vision_states(tower: ClipTower, images) -> list[Float[Array, "R C D"]]:
    states = [tower.embed(pixels(images))]
    for block in tower.layers:
        states.append(block(states[-1]))
    return states


def dense_loss(model: Llava, heads: AuxiliaryHeads, states, features, batch: Packed, targets: Targets, soft):
    """Per-patch objectness, attributes against the decoder's word embeddings, box corners against its output rows,
    and the class token's multi-label presence objective. Returns (loss, accuracies of shape, colour, size)."""
    thing = batch.patch_thing
    on = thing >= 0
    normed = features * jax.lax.rsqrt(jnp.mean(features**2, axis=-1, keepdims=True) + 1e-6)
    objectness = _binary(heads.object(normed)[..., 0], on).mean()
    label = jnp.take_along_axis(batch.attributes, jnp.maximum(thing, 0)[..., None], axis=1)
    losses, accuracies = [], []
    for column, ids in enumerate(targets.words):
        logits = normed @ model.decoder.embed.table[jnp.array(ids)].T
        losses.append(_mean(_cross_entropy(logits, jax.nn.one_hot(label[..., column], len(ids))), on))
        accuracies.append(_mean(logits.argmax(-1) == label[..., column], on))
    boxes = jnp.take_along_axis(batch.boxes, jnp.maximum(thing, 0)[..., None], axis=1)
    read = heads.corners(normed).reshape(*normed.shape[:2], 4, -1)
    for corner, first in enumerate(targets.coordinates):
        logits = read[:, :, corner] @ jax.lax.dynamic_slice_in_dim(model.decoder.head.kernel[...], first, BINS, axis=1)
        bins = jnp.round(boxes[..., corner] * (BINS - 1)).astype(jnp.int32)
        losses.append(0.5 * _mean(_cross_entropy(logits, soft[first + bins][..., first : first + BINS]), on))
    present = jnp.concatenate([_present(batch.attributes[..., c], len(ids)) for c, ids in enumerate(targets.words)], -1)
    seen = sum(_binary(heads.presence(state[:, 0]), present).mean() for state in states[-2:])
    return objectness + sum(losses) + seen, jnp.stack(accuracies)


def answer_loss(
    model: Llava, heads: AuxiliaryHeads, features, batch: Packed, bypass: Bool[Array, "L R P"], soft
) -> tuple[Float[Array, ""], Float[Array, ""], Int[Array, "R Q W"]]:
    """(next-token loss, pointer loss, most likely token of every slot).

    bypass: visual tokens that skip a decoder layer on the residual stream.
    """
    decoder, patches = model.decoder, features.shape[1]
    scenes, asked, slots = batch.ids.shape
    prefix = decoder.embed(jnp.broadcast_to(prefix_ids(), (scenes, PREFIX))).at[:, PREFIX - patches :].set(features)
    x = decoder.embed(batch.ids.reshape(scenes, -1))
    ropes = _ropes(decoder.config, scenes, asked, slots)
    pointers = []
    for number, layer in enumerate(decoder.layers):
        runs = jnp.ones((scenes, PREFIX), bool).at[:, PREFIX - patches :].set(~bypass[number])
        prefix, x = shared_prefix_layer(layer, prefix, x, ropes, runs, asked)
        if number in POINTER_LAYERS:
            head = POINTER_LAYERS.index(number)
            pointers.append(_pointer(heads.asking[head], heads.asked[head], prefix, x, batch))
    logits = decoder.logits(x).reshape(scenes, asked, slots, -1)
    losses = _cross_entropy(logits, soft[batch.label]) * batch.weight
    return losses.sum() / batch.weight.sum(), sum(pointers), logits.argmax(-1)


def _ropes(config, scenes: int, asked: int, slots: int) -> tuple[Rope, Rope]:
    prefix = jnp.broadcast_to(jnp.arange(PREFIX), (scenes, PREFIX))
    questions = jnp.broadcast_to(PREFIX + jnp.tile(jnp.arange(slots), asked), (scenes, asked * slots))
    return rope_tables(prefix, config), rope_tables(questions, config)


def shared_prefix_layer(layer: DecoderLayer, prefix, x, ropes: tuple[Rope, Rope], runs: Bool[Array, "R S"], asked: int):
    """One decoder layer on an image prefix `[R, S, D]` and the questions behind it `[R, Q*W, D]`, each of which sees
    the prefix and itself. Prefix slots that do not run are neither read nor changed."""
    causal = jnp.tril(jnp.ones((prefix.shape[1],) * 2, bool)) & runs[:, None]
    passed, k_prefix, v_prefix = layer.prefill(prefix, ropes[0], causal)
    normed = layer.attn_norm(x)
    q = rotate(layer.attn.q(normed), ropes[1]) * layer.attn.q.kernel.shape[-1] ** -0.5
    k, v = rotate(layer.attn.k(normed), ropes[1]), layer.attn.v(normed)
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


def _pointer(asking: Linear, asked: Linear, prefix, x, batch: Packed) -> Float[Array, ""]:
    """Cross-entropy of the last prompt token's match against the patches of the objects the question is about, or
    against the first token of all where it is about none."""
    questions = jnp.take_along_axis(x.reshape(*batch.ids.shape, -1), batch.ask[..., None, None], axis=2)[:, :, 0]
    places = jnp.concatenate([prefix[:, :1], prefix[:, PREFIX - batch.patch_thing.shape[1] :]], axis=1)
    logits = jnp.einsum("RQD,RPD->RQP", asking(questions), asked(places)) / x.shape[-1] ** 0.5
    objects = batch.subjects.shape[-1]
    shown = jnp.concatenate([jnp.full_like(batch.patch_thing[:, :1], objects - 1), batch.patch_thing], axis=1)
    wanted = jnp.einsum("RQO,RPO->RQP", batch.subjects.astype(jnp.float32), jax.nn.one_hot(shown, objects))
    wanted = wanted / jnp.maximum(wanted.sum(-1, keepdims=True), 1)
    return _mean(_cross_entropy(logits, wanted), batch.weight.sum(axis=-1) > 0)


def _cross_entropy(logits, wanted):
    return -(wanted * jax.nn.log_softmax(logits, axis=-1)).sum(axis=-1)


def _binary(logits, wanted):
    return jax.nn.softplus(logits) - logits * wanted


def _mean(values, where):
    return (values * where).sum() / jnp.maximum(where.sum(), 1)


def _present(labels: Int[Array, "R O"], classes: int) -> Float[Array, "R classes"]:
    return jax.nn.one_hot(labels, classes).max(axis=1)
