"""What the layers of both Qwen towers share: fused projections, and 2-D rotary positions of patches.

Letters: I images, P patches, D width, N heads, H head dim.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from reroute_jax.nn.layers import OutputProjection, Rope, constant, parameter, rotate
from reroute_jax.nn.products import matmul
from reroute_jax.nn.sharding import constrain
from reroute_jax.vision.qwen_config import PatchedVisionConfig

NORM_EPS = 1e-6
ROPE_THETA = 10000.0


class FusedProjection(nnx.Module):
    """Width to the heads of queries, keys and values."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs, dtype):
        shape = (3, heads, width // heads)
        self.kernel = parameter(rngs, (*shape, width), (None, "heads", None, "embed"), dtype, width)
        self.bias = constant(0.0, shape, (None, "heads", None), dtype)

    def __call__(self, x: Float[Array, "I P D"]) -> tuple[Float[Array, "I N P H"], ...]:
        """Three products: one, of all three kernels side by side, could not be split by heads."""
        _, heads, dim, width = self.kernel.shape

        def projected(kernel: Float[Array, "N H D"], bias: Float[Array, "N H"]) -> Float[Array, "I N P H"]:
            y = matmul(x, kernel.reshape(heads * dim, width)).reshape(*x.shape[:2], heads, dim) + bias
            return constrain(y.swapaxes(1, 2), "rows", "heads")

        return tuple(projected(self.kernel[part], self.bias[part]) for part in range(3))


class RotaryAttention(nnx.Module):
    """The projections; which patches a patch sees is its tower's."""

    def __init__(self, config: PatchedVisionConfig, *, rngs: nnx.Rngs, dtype):
        width, heads = config.hidden_size, config.num_heads
        self.qkv = FusedProjection(width, heads, rngs=rngs, dtype=dtype)
        self.o = OutputProjection(heads, width // heads, width, bias=True, rngs=rngs, dtype=dtype)

    def rotated(self, x: Float[Array, "I P D"], rope: Rope) -> tuple[Float[Array, "I N P H"], ...]:
        """Queries and keys at their positions, and values."""
        q, k, v = self.qkv(x)
        return rotate(q, rope), rotate(k, rope), v


def rotary(place: Int[Array, "I P 2"], head_dim: int) -> Rope:
    """fp32 tables: a quarter of the head's dimensions turns with the row, the next with the column, and the other half
    of the head repeats them."""
    half = head_dim // 2
    frequencies = 1 / ROPE_THETA ** (np.arange(0, half, 2, dtype=np.float32) / half)
    angles = (place[..., None] * frequencies).reshape(*place.shape[:2], half)
    return Rope(jnp.cos(angles), jnp.sin(angles))
