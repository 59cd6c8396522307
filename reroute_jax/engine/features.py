"""What a batch's rows read of their images."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from reroute_jax.config import DecoderConfig
from reroute_jax.engine.batching import Images
from reroute_jax.models import FAMILIES
from reroute_jax.nn.sharding import constrain


def image_features(module: nnx.Module, images: Images) -> tuple[Float[Array, "B F E"], Int[Array, "B F"]]:
    """Features of each row's images, one image behind the other, and the index of each feature among its row's original
    visual tokens."""
    family = FAMILIES[module.config.family]
    pixels, arrays = jax.tree.map(lambda array: constrain(array, "rows"), (images.pixels, images.arrays))
    features, anchors = family.encode_images(module, pixels, arrays, images.merge)
    rows, width = len(images.first), features.shape[-1]
    of_row = jnp.asarray(images.first).reshape(-1, 1) + anchors
    return features.reshape(rows, -1, width), of_row.reshape(rows, -1)


def no_features(config: DecoderConfig, rows: int) -> tuple[Float[Array, "B 1 D"], Int[Array, "B 1"]]:
    """For rows none of which has an image: one feature that nobody reads."""
    return jnp.zeros((rows, 1, config.hidden_size)), jnp.zeros((rows, 1), jnp.int32)
