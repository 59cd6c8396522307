"""LLaVA-1.5 (arXiv 2310.03744): CLIP tower, two-layer projector, LLaMA decoder; pixels to features, prompts to rows.

Letters: I images, n patches of an image, N1 tokens left of them after a merge, F = I * N1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from reroute_jax.config import ModelConfig
from reroute_jax.decoder import Decoder
from reroute_jax.routing.nuwa import stage_one
from reroute_jax.routing.plan import NuwaMerge, PoolMerge
from reroute_jax.routing.pool import average_pool
from reroute_jax.vision.clip import ClipTower, Projector, nuwa_inputs


class Llava(nnx.Module):
    """The parameters of one model; functions in this file and in `decoder.py` run them."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype):
        self.config = config
        self.vision = ClipTower(config.vision, rngs=rngs, dtype=dtype)
        self.projector = Projector(config, rngs=rngs, dtype=dtype)
        self.decoder = Decoder(config.decoder, rngs=rngs, dtype=dtype)


def encode_images(
    model: Llava, pixels: Float[Array, "I 3 height width"], merge: NuwaMerge | PoolMerge | None
) -> tuple[Float[Array, "F D"], Int[Array, " F"]]:
    """Image features at decoder width, flattened over images, and the original patch each stands for, counted over
    the whole batch (image i, patch p: `i * n + p`). `merge` is static."""
    vision, layer = model.config.vision, model.config.feature_layer
    grid, images = vision.grid, pixels.shape[0]
    patches = grid[0] * grid[1]
    if isinstance(merge, NuwaMerge):
        select = partial(
            stage_one,
            grid=grid,
            top_n=merge.top_n,
            keep=merge.anchors(patches, grid),
            radius=merge.radius(grid),
            self_weight_override=merge.self_weight_override,
        )
        merged, anchors = jax.vmap(select)(*nuwa_inputs(model.vision, pixels, layer))
        features = model.projector(merged)
    else:
        features = model.projector(model.vision.features(pixels, layer))
        anchors = jnp.broadcast_to(jnp.arange(patches), (images, patches))
        if isinstance(merge, PoolMerge):
            features, anchors = jax.vmap(partial(average_pool, grid=grid, rows=merge.rows, cols=merge.cols))(features)
    whole = anchors + patches * jnp.arange(images)[:, None]
    return features.reshape(-1, features.shape[-1]), whole.reshape(-1)


def chat_prompt(text: str, images: int) -> str:
    """The prompt of the checkpoint's own chat template: one user turn, no system sentence, images first."""
    placeholders = "<image>\n" * images
    return f"USER: {placeholders}{text} ASSISTANT:"


def expand_image_tokens(ids: Sequence[int], image_token: int, patches: int) -> list[int]:
    """Each image placeholder becomes `patches` of them."""
    return [token for old in ids for token in ([old] * patches if old == image_token else [old])]
