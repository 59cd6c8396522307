"""The functional door, for people who bring their own jit, grad, vmap or mesh.

    params = reroute_jax.init(config, jax.random.key(0))         # or `model.module`
    batch = model.inputs(input_ids=ids, pixel_values=pixels, schedule=schedule)
    out = reroute_jax.apply(params, batch.prompt, batch.plan, batch.images)

Parameters are a Flax module, which is a pytree with static configuration. Everything that decides a shape is static in
`plan`; everything else, how many tokens a decision keeps included (`prompt.keep`), is an array.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from reroute_jax.config import ModelConfig
from reroute_jax.decoder import Decision, Prompt, walk
from reroute_jax.engine.batching import Images
from reroute_jax.engine.features import image_features, no_features
from reroute_jax.models import FAMILIES
from reroute_jax.nn.cache import KVCache
from reroute_jax.routing.static_plan import RoutingPlan


@jax.tree_util.register_dataclass
@dataclass
class Output:
    """Of the rows that ran the last stage: text and selected visual tokens, in prompt order, padded behind.

    logits: fp32. slots: where each stood in the prompt, -1 for padding. decisions: what each saw and chose.
    """

    logits: Float[Array, "B C vocab"]
    slots: Int[Array, "B C"]
    valid: Bool[Array, "B C"]
    cache: KVCache
    decisions: tuple[Decision, ...]


def init(config: ModelConfig, key: Array, dtype=jnp.float32) -> nnx.Module:
    """Random parameters of a model of this configuration."""
    return FAMILIES[config.family].model(config, rngs=nnx.Rngs(key), dtype=jnp.dtype(dtype))


def abstract_params(config: ModelConfig, dtype=jnp.float32) -> nnx.Module:
    """The same as shapes; nothing is allocated."""
    return nnx.clone(_description(config, jnp.dtype(dtype)))


@lru_cache(maxsize=4)
def _description(config: ModelConfig, dtype: jnp.dtype) -> nnx.Module:
    """Tracing every initialiser takes longer than anything else in opening a small checkpoint."""
    return nnx.eval_shape(lambda: FAMILIES[config.family].model(config, rngs=_OneKey(0), dtype=dtype))


class _OneKey(nnx.Rngs):
    """For shapes, which no key changes: counting draws takes 5 ms a traced parameter (flax 0.12.8, November 2026)."""

    def params(self) -> Array:
        return jax.random.key(0)


def apply(params: nnx.Module, prompt: Prompt, plan: RoutingPlan, images: Images | None = None) -> Output:
    """Logits of all positions that ran the last stage, differentiable in `params`. Pure; nothing is compiled here.

    prompt, images: arrays as `Model.inputs` makes them. plan: static, of a schedule for these shapes.
    """
    prompt, images = jax.tree.map(jnp.asarray, (prompt, images))
    if images is None:
        features, anchors = no_features(params.config.decoder, len(prompt.ids))
    else:
        features, anchors = image_features(params, images)
    walked = walk(params.decoder, prompt, features, anchors, plan)
    rows = walked.rows
    return Output(params.decoder.logits(rows.hidden), rows.slot, rows.valid, walked.cache, walked.decisions)
