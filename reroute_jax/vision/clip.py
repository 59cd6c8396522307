"""CLIP vision transformer and LLaVA's projector.

Letters: I images, P patch side, n patches, C = n + 1 slots (class token first), D width, N heads, H head dim,
F features: D for each hidden state that the projector sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from reroute_jax.nn.attention import attention, received_attention
from reroute_jax.nn.layers import HeadProjection, Linear, OutputProjection, constant, parameter, traced_once
from reroute_jax.nn.precision import precision
from reroute_jax.routing.tower import Tower

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


@dataclass(frozen=True)
class ClipConfig:
    """A CLIP vision transformer and LLaVA's projector behind it. `feature_layers` index the tower's hidden states
    (0 = input of the first block); features of several stand side by side, in this order."""

    hidden_size: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    norm_eps: float
    activation: str
    feature_layers: tuple[int, ...]
    projector_bias: bool
    projector_activation: str

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of one image as (rows, columns)."""
        side = self.image_size // self.patch_size
        return side, side


class LayerNorm(nnx.Module):
    def __init__(self, width: int, eps: float, *, dtype):
        self.scale = constant(1.0, (width,), ("embed",), dtype)
        self.bias = constant(0.0, (width,), ("embed",), dtype)
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        return (normed * self.scale + self.bias).astype(x.dtype)


class PatchEmbed(nnx.Module):
    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs, dtype):
        shape = (config.hidden_size, 3, config.patch_size, config.patch_size)
        self.kernel = parameter(rngs, shape, ("embed", None, None, None), dtype, 3 * config.patch_size**2)

    def __call__(self, pixels: Float[Array, "I 3 height width"]) -> Float[Array, "I n D"]:
        patches = jax.lax.conv_general_dilated(
            pixels,
            self.kernel[...],
            self.kernel.shape[2:],
            "VALID",
            dimension_numbers=("NCHW", "OIHW", "NHWC"),
            precision=precision(pixels),
        )
        return patches.reshape(pixels.shape[0], -1, self.kernel.shape[0])


class ClipAttention(nnx.Module):
    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs, dtype):
        width, heads = config.hidden_size, config.num_heads
        keep = {"bias": True, "rngs": rngs, "dtype": dtype}
        self.q = HeadProjection(width, heads, width // heads, "heads", **keep)
        self.k = HeadProjection(width, heads, width // heads, "heads", **keep)
        self.v = HeadProjection(width, heads, width // heads, "heads", **keep)
        self.o = OutputProjection(heads, width // heads, width, **keep)

    def __call__(self, x: Float[Array, "I C D"]) -> Float[Array, "I C D"]:
        return self.o(attention(self.q(x), self.k(x), self.v(x)))

    def class_row(self, x: Float[Array, "I C D"]) -> Float[Array, "I n"]:
        """Attention of the class token over the patches, fp32, summed over heads; normalised over all C keys."""
        q, k = self.q(x[:, :1]).astype(jnp.float32), self.k(x).astype(jnp.float32)
        logits = jnp.einsum("INTH,INCH->INTC", q, k, precision=precision(q))[:, :, 0] * q.shape[-1] ** -0.5
        return jax.nn.softmax(logits, axis=-1).sum(axis=1)[:, 1:]


class ClipMLP(nnx.Module):
    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs, dtype):
        keep = {"bias": True, "rngs": rngs, "dtype": dtype}
        self.up = Linear(config.hidden_size, config.mlp_dim, ("embed", "mlp"), **keep)
        self.down = Linear(config.mlp_dim, config.hidden_size, ("mlp", "embed"), **keep)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "I C D"]) -> Float[Array, "I C D"]:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class ClipLayer(nnx.Module):
    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs, dtype):
        self.norm1 = LayerNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.attn = ClipAttention(config, rngs=rngs, dtype=dtype)
        self.norm2 = LayerNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.mlp = ClipMLP(config, rngs=rngs, dtype=dtype)

    @traced_once
    def __call__(self, x: Float[Array, "I C D"]) -> Float[Array, "I C D"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def class_attention(self, x: Float[Array, "I C D"]) -> Float[Array, "I n"]:
        return self.attn.class_row(self.norm1(x))


class ClipTower(nnx.Module):
    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs, dtype):
        width, slots = config.hidden_size, 1 + config.grid[0] * config.grid[1]
        self.class_embed = parameter(rngs, (width,), ("embed",), dtype, width)
        self.patch_embed = PatchEmbed(config, rngs=rngs, dtype=dtype)
        self.position_embed = parameter(rngs, (slots, width), (None, "embed"), dtype, width)
        self.pre_norm = LayerNorm(width, config.norm_eps, dtype=dtype)
        self.layers = nnx.List([ClipLayer(config, rngs=rngs, dtype=dtype) for _ in range(config.num_layers)])
        # Part of every checkpoint; LLaVA reads hidden states from before it.
        self.post_norm = LayerNorm(width, config.norm_eps, dtype=dtype)

    def embed(self, pixels: Float[Array, "I 3 height width"]) -> Float[Array, "I C D"]:
        """Hidden state 0: the input of the first block."""
        patches = self.patch_embed(pixels.astype(self.class_embed.dtype))
        first = jnp.broadcast_to(self.class_embed[...], (len(patches), 1, patches.shape[-1]))
        side = self.patch_embed.kernel.shape[2]
        positions = self.positions(pixels.shape[2] // side, pixels.shape[3] // side)
        return self.pre_norm(jnp.concatenate([first, patches], axis=1) + positions)

    def positions(self, rows: int, cols: int) -> Float[Array, "C D"]:
        """The table, for images of another size resized as transformers' `interpolate_pos_encoding` does it; the class
        token keeps its own."""
        table = self.position_embed[...]
        side = math.isqrt(len(table) - 1)
        if (rows, cols) == (side, side):
            return table
        square = table[1:].reshape(side, side, -1).astype(jnp.float32)
        weights = cubic_weights(side, rows), cubic_weights(side, cols)
        resized = jnp.einsum("ry,cx,yxD->rcD", *weights, square, precision=jax.lax.Precision.HIGHEST)
        return jnp.concatenate([table[:1], resized.reshape(rows * cols, -1).astype(table.dtype)])


def cubic_weights(size: int, count: int) -> Float[np.ndarray, "count size"]:
    """fp32 weights of bicubic resizing along one axis as PyTorch has it: a = -0.75, centres of cells on centres, places
    beyond the border read the border."""
    a, at = -0.75, (np.arange(count) + 0.5) * size / count - 0.5
    taps = np.floor(at).astype(int)[:, None] + np.arange(-1, 3)
    d = np.abs(at[:, None] - taps)
    near, far = ((a + 2) * d - (a + 3)) * d**2 + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    weights = np.zeros((count, size))
    np.add.at(weights, (np.arange(count)[:, None], np.clip(taps, 0, size - 1)), np.where(d <= 1, near, far))
    return weights.astype(np.float32)


class Projector(nnx.Module):
    """Two linear layers from the width of the features to decoder width."""

    def __init__(self, config: ClipConfig, width: int, *, rngs: nnx.Rngs, dtype):
        keep = {"bias": config.projector_bias, "rngs": rngs, "dtype": dtype}
        self.fc1 = Linear(config.hidden_size * len(config.feature_layers), width, ("embed", "mlp"), **keep)
        self.fc2 = Linear(width, width, ("mlp", "embed"), **keep)
        self.activation = config.projector_activation

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows E"]:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class ClipImages(Tower):
    """Images in the tower, as merges read them (`routing/tower.py`); traced, and no block runs that is not needed.
    layers: hidden states that the projector sees."""

    def __init__(
        self, tower: ClipTower, projector: Projector, pixels: Float[Array, "I 3 height width"], layers: tuple[int, ...]
    ):
        self.tower, self.projector, self.layers = tower, projector, layers
        self.states = [tower.embed(pixels)]

    def state(self, number: int) -> Float[Array, "I C D"]:
        """Hidden state `number`; 0 is the input of block 0."""
        while len(self.states) <= number:
            self.states.append(self.tower.layers[len(self.states) - 1](self.states[-1]))
        return self.states[number]

    def features(self) -> Float[Array, "I n F"]:
        """Patches of the hidden states that the projector sees, side by side."""
        return jnp.concatenate([self.state(layer)[:, 1:] for layer in self.layers], axis=-1)

    def class_features(self) -> Float[Array, "I F"]:
        return jnp.concatenate([self.state(layer)[:, 0] for layer in self.layers], axis=-1)

    def project(self, features: Float[Array, "I C F"]) -> Float[Array, "I C E"]:
        return self.projector(features)

    def metric(self) -> Float[Array, "I n"]:
        """Attention of the class token in the second-to-last block, summed over heads (4.2)."""
        return self.tower.layers[-2].class_attention(self.state(len(self.tower.layers) - 2))

    def similarity(self, order: str) -> Float[Array, "I n D"]:
        """Mean of the hidden states from two thirds of the depth to the end (4.2); patches have one order."""
        depth = len(self.tower.layers)
        span = [self.state(number) for number in range(-(-2 * depth // 3), depth + 1)]
        return jnp.stack(span).astype(jnp.float32).mean(axis=0)[:, 1:]

    def keys(self) -> Float[Array, "I n H"]:
        """Of the second-to-last block, unscaled, mean over heads (16.2)."""
        block = self.tower.layers[-2]
        keys = block.attn.k(block.norm1(self.state(len(self.tower.layers) - 2)))
        return keys.astype(jnp.float32).mean(axis=1)[:, 1:]

    def objects(self) -> Float[Array, "I n"]:
        """Block 9 of 24, counted from 1, and what stands for it at another depth (16.3)."""
        return self._received(round(9 * len(self.tower.layers) / 24) - 1)

    def registers(self) -> Float[Array, "I n"]:
        """The second-to-last block (16.3)."""
        return self._received(len(self.tower.layers) - 2)

    def _received(self, number: int) -> Float[Array, "I n"]:
        """Attention that patches receive from all tokens, fp32, mean over heads, sum over queries."""
        block = self.tower.layers[number]
        normed = block.norm1(self.state(number))
        everything = jnp.full(normed.shape[:1], normed.shape[1])
        return received_attention(block.attn.q(normed), block.attn.k(normed), everything)[:, 1:]
