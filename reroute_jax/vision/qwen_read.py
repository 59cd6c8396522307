"""What reductions before the decoder read of a Qwen tower (5.2, 16): attention, keys and middle states of its patches,
by token in raster order.

Letters: I images, n merged tokens, P patches, D width, N heads, H head dim, F features of a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from reroute_jax.nn.attention import received_attention
from reroute_jax.routing.tower import Tower

# Nuwa compares patches by the mean of blocks 7 to 23 of 32.
_SIMILARITY_SPAN = (7, 23, 32)


class QwenRead(Tower):
    """A batch of images in a tower with `layers`, `merger`, `states(pixels)` and `rope(pixels)`. What nobody asks for
    is not computed; rows at padding mean nothing."""

    def __init__(self, tower, pixels):
        self.tower, self.pixels = tower, jax.tree.map(jnp.asarray, pixels)
        self.states = tower.states(self.pixels)

    @property
    def last(self) -> int:
        return len(self.tower.layers) - 1

    @property
    def middle(self) -> int:
        """Block 16 of 32, counted from 1 (16.3)."""
        return max(0, round(16 * len(self.tower.layers) / 32) - 1)

    def project(self, features: Float[Array, "I C F"]) -> Float[Array, "I C F"]:
        """They leave the patch merger at decoder width."""
        return features

    def metric(self) -> Float[Array, "I n"]:
        """Attention that a token's patches receive in the last block: mean over heads, sum over queries, mean over its
        patches (5.2)."""
        return self._received(self.last)

    def similarity(self, order: str) -> Float[Array, "I n F"]:
        """Mean of the middle blocks' patches, sent through the merger (5.2)."""
        return self.tower.merger(middle_states(self.states[1:]))

    def keys(self) -> Float[Array, "I n H"]:
        """Of the last block at their places, mean over heads and over a token's patches (16.2)."""
        _, keys = self._queries_and_keys(self.last)
        return self._by_token(keys.astype(jnp.float32).mean(axis=1))

    def registers(self) -> Float[Array, "I n"]:
        """The last block (16.3)."""
        return self._received(self.last)

    def _received(self, number: int) -> Float[Array, "I n"]:
        q, k = self._queries_and_keys(number)
        return self._by_token(received_attention(q, k, self.pixels.count)[..., None])[..., 0]

    def _queries_and_keys(self, number: int) -> tuple[Float[Array, "I N P H"], Float[Array, "I N P H"]]:
        """Of a block, at their places."""
        block = self.tower.layers[number]
        q, k, _ = block.attn.rotated(block.norm1(self.states[number]), self.tower.rope(self.pixels))
        return q, k

    def _by_token(self, patches: Float[Array, "I P X"]) -> Float[Array, "I n X"]:
        """Mean over the patches of each token."""
        images, _, width = patches.shape
        return patches.reshape(images, -1, self.tower.config.merge**2, width).mean(axis=2)


def middle_states(states: Sequence[Float[Array, "I P D"]]) -> Float[Array, "I P D"]:
    """The mean of the middle blocks' outputs, which Nuwa compares patches by (5.2)."""
    first, final, of = _SIMILARITY_SPAN
    span = states[first * len(states) // of : final * len(states) // of + 1]
    return jnp.stack(span).astype(jnp.float32).mean(axis=0).astype(states[0].dtype)
