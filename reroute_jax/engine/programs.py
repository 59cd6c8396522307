"""The compiled functions. They do all device work; nothing of the host's is static but the shapes and the plan."""

from __future__ import annotations

import logging

import jax

from reroute_jax import decoder as walker
from reroute_jax import prefix
from reroute_jax.decoder import Prefilled
from reroute_jax.engine import generation
from reroute_jax.engine.batching import Images
from reroute_jax.engine.compilation import compiled
from reroute_jax.engine.features import image_features
from reroute_jax.models import FAMILIES
from reroute_jax.nn.weights import Weights

log = logging.getLogger("reroute_jax")


@compiled()
def encode(weights: Weights, images: Images) -> tuple[jax.Array, jax.Array]:
    features, anchors = image_features(weights.module, images)
    log.info("compiling encode_images for %d images of %d tokens", images.first.size, anchors.size // images.first.size)
    return features, anchors


@compiled()
def members(weights: Weights, images: Images) -> jax.Array:
    """Of each feature the tokens of its image that a merge made it of, Bool `[I, C, n]`."""
    log.info("compiling members of %s", type(images.merge).__name__)
    tower = FAMILIES[weights.config.family].tower(weights.module, images.pixels)
    return images.merge.members(tower, jax.tree.map(jax.numpy.asarray, images.arrays))


@compiled(static_argnames="plan")
def prefill(decoder: Weights, prompt, features, anchors, plan) -> Prefilled:
    log.info("compiling prefill for ids %s, %d stages", prompt.ids.shape, len(plan.stages))
    return walker.prefill(decoder.module, prompt, features, anchors, plan)


@compiled(static_argnames="opening")
def run_prefix(decoder: Weights, prompt, features, anchors, opening) -> tuple[prefix.PrefixStates, ...]:
    log.info("compiling the first %d layers for ids %s up to the last image", opening.layers, prompt.ids.shape)
    return prefix.run_prefix(decoder.module, prompt, features, anchors, opening)


@compiled(static_argnames=("plan", "size"))
def prefill_behind(decoder: Weights, prompt, prefixes, starts, index, plan, size) -> Prefilled:
    log.info("compiling prefill behind images for ids %s, %d stages", prompt.ids.shape, len(plan.stages))
    return prefix.prefill_behind(decoder.module, prompt, prefixes, starts, index, plan, size)


@compiled(donate_argnames="cache")
def begin(logits, cache, seen, live, sampling):
    log.info("compiling the choice of first tokens for logits %s", logits.shape)
    return generation.begin(logits, cache, seen, live, sampling)


@compiled(donate_argnames="state")
def decode(decoder: Weights, state, sampling, steps):
    log.info("compiling decode for %d rows, %d slots in stage 0", len(state.token), _slots(state))
    return generation.decode(decoder.module, state, sampling, steps)


@compiled(static_argnames="slots")
def keep_rows(state, sampling, rows, slots):
    log.info("compiling %d of %d rows with %d slots more", rows.size, len(state.token), slots)
    return generation.keep_rows(state, sampling, rows, slots)


def _slots(state: generation.DecodeState) -> int:
    return state.cache.stages[0].keys[0].shape[2]
