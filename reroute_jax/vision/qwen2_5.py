"""The vision tower of Qwen2.5-VL (arXiv 2502.13923): windowed attention, 2-D rotary positions, patch merger.

Patches keep the image processor's order throughout. Windowed layers gather queries, keys and values into windows and
gather the result back, so nothing else is permuted and merged tokens come out in raster order.
Letters: I images, n merged tokens, P patches, W windows, S patches a window, D width, N heads, H head dim, E decoder
width.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from reroute_jax.errors import RerouteError
from reroute_jax.nn.attention import attention, received_attention
from reroute_jax.nn.layers import (
    GatedMLP,
    Linear,
    OutputProjection,
    RMSNorm,
    Rope,
    constant,
    parameter,
    rotate,
    take_rows,
)
from reroute_jax.nn.products import matmul
from reroute_jax.routing.tower import Tower
from reroute_jax.vision.qwen_config import QwenVisionConfig
from reroute_jax.vision.qwen_windows import QwenPixels

NORM_EPS = 1e-6
ROPE_THETA = 10000.0
# Nuwa compares patches by the mean of blocks 7 to 23 of 32.
_SIMILARITY_SPAN = (7, 23, 32)


class PatchEmbed(nnx.Module):
    """A convolution whose stride is its kernel: one matrix on a patch's values."""

    def __init__(self, config: QwenVisionConfig, *, rngs: nnx.Rngs, dtype):
        shape = (config.hidden_size, config.patch_values)
        self.kernel = parameter(rngs, shape, ("embed", None), dtype, config.patch_values)

    def __call__(self, patches: Float[Array, "I P values"]) -> Float[Array, "I P D"]:
        return matmul(patches.astype(self.kernel.dtype), self.kernel[...])


class FusedProjection(nnx.Module):
    """Width to the heads of queries, keys and values."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs, dtype):
        shape = (3, heads, width // heads)
        self.kernel = parameter(rngs, (*shape, width), (None, "heads", None, "embed"), dtype, width)
        self.bias = constant(0.0, shape, (None, "heads", None), dtype)

    def __call__(self, x: Float[Array, "I P D"]) -> Float[Array, "3 I N P H"]:
        *heads, width = self.kernel.shape
        y = matmul(x, self.kernel.reshape(-1, width)).reshape(*x.shape[:2], *heads) + self.bias
        return y.transpose(2, 0, 3, 1, 4)


class VisionAttention(nnx.Module):
    """Attention of an image's patches over the whole image, or over the window they stand in."""

    def __init__(self, config: QwenVisionConfig, windowed: bool, *, rngs: nnx.Rngs, dtype):
        width, heads = config.hidden_size, config.num_heads
        self.qkv = FusedProjection(width, heads, rngs=rngs, dtype=dtype)
        self.o = OutputProjection(heads, width // heads, width, bias=True, rngs=rngs, dtype=dtype)
        self.windowed = windowed

    def __call__(self, x: Float[Array, "I P D"], rope: Rope, pixels: QwenPixels) -> Float[Array, "I P D"]:
        q, k, v = self.rotated(x, rope)
        return self.o(window_attention(q, k, v, pixels) if self.windowed else image_attention(q, k, v, pixels))

    def rotated(self, x: Float[Array, "I P D"], rope: Rope) -> tuple[Float[Array, "I N P H"], ...]:
        """Queries and keys at their positions, and values."""
        q, k, v = self.qkv(x)
        return rotate(q, rope), rotate(k, rope), v


class VisionLayer(nnx.Module):
    def __init__(self, config: QwenVisionConfig, windowed: bool, *, rngs: nnx.Rngs, dtype):
        width = config.hidden_size
        self.norm1 = RMSNorm(width, NORM_EPS, dtype=dtype)
        self.attn = VisionAttention(config, windowed, rngs=rngs, dtype=dtype)
        self.norm2 = RMSNorm(width, NORM_EPS, dtype=dtype)
        self.mlp = GatedMLP(width, config.mlp_dim, bias=True, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "I P D"], rope: Rope, pixels: QwenPixels) -> Float[Array, "I P D"]:
        with jax.named_scope("attention"):
            x = x + self.attn(self.norm1(x), rope, pixels)
        with jax.named_scope("mlp"):
            return x + self.mlp(self.norm2(x))


class Merger(nnx.Module):
    """`merge^2` neighbouring patches to one token at decoder width."""

    def __init__(self, config: QwenVisionConfig, out: int, *, rngs: nnx.Rngs, dtype):
        width, keep = config.merge**2 * config.hidden_size, {"bias": True, "rngs": rngs, "dtype": dtype}
        self.norm = RMSNorm(config.hidden_size, NORM_EPS, dtype=dtype)
        self.fc1 = Linear(width, width, ("embed", "mlp"), **keep)
        self.fc2 = Linear(width, out, ("mlp", "embed"), **keep)

    def __call__(self, x: Float[Array, "I P D"]) -> Float[Array, "I n E"]:
        groups = self.norm(x).reshape(x.shape[0], -1, self.fc1.kernel.shape[1])
        return self.fc2(jax.nn.gelu(self.fc1(groups), approximate=False))


class QwenTower(nnx.Module):
    """Images of any size to visual tokens at width `out`."""

    def __init__(self, config: QwenVisionConfig, out: int, *, rngs: nnx.Rngs, dtype):
        self.config = config
        self.patch_embed = PatchEmbed(config, rngs=rngs, dtype=dtype)
        windowed = [layer not in config.full_attention for layer in range(config.num_layers)]
        self.layers = nnx.List([VisionLayer(config, local, rngs=rngs, dtype=dtype) for local in windowed])
        self.merger = Merger(config, out, rngs=rngs, dtype=dtype)

    def states(self, pixels: QwenPixels) -> list[Float[Array, "I P D"]]:
        """The patches after each block. At padding the numbers mean nothing."""
        pixels = jax.tree.map(jnp.asarray, pixels)
        rope = rotary(pixels.place, self.config.hidden_size // self.config.num_heads)
        x, states = self.patch_embed(pixels.patches), []
        for layer in self.layers:
            x = layer(x, rope, pixels)
            states.append(x)
        return states

    def features(self, pixels: QwenPixels) -> Float[Array, "I n E"]:
        """Visual tokens in raster order; of image i the first `count[i] / merge^2` are real."""
        return self.merger(self.states(pixels)[-1])


def rotary(place: Int[Array, "I P 2"], head_dim: int) -> Rope:
    """fp32 tables: a quarter of the head's dimensions turns with the row, the next with the column, and the other half
    of the head repeats them."""
    half = head_dim // 2
    frequencies = 1 / ROPE_THETA ** (np.arange(0, half, 2, dtype=np.float32) / half)
    angles = (place[..., None] * frequencies).reshape(*place.shape[:2], half)
    return Rope(jnp.cos(angles), jnp.sin(angles))


def image_attention(
    q: Float[Array, "I N P H"], k: Float[Array, "I N P H"], v: Float[Array, "I N P H"], pixels: QwenPixels
) -> Float[Array, "I N P H"]:
    """Every patch sees the real patches of its image."""
    return attention(q, k, v, lengths=pixels.count)


def window_attention(
    q: Float[Array, "I N P H"], k: Float[Array, "I N P H"], v: Float[Array, "I N P H"], pixels: QwenPixels
) -> Float[Array, "I N P H"]:
    """Every patch sees the patches of its window; zeros at padding."""
    images, heads, slots, dim = q.shape
    size = pixels.windows.shape[2]
    flat = pixels.windows.reshape(images, -1)

    def spread(x: Float[Array, "I N P H"]) -> Float[Array, "blocks N S H"]:
        return take_rows(x.swapaxes(1, 2), flat).reshape(-1, size, heads, dim).swapaxes(1, 2)

    # The patches of a window stand first in it.
    filled = (flat < slots).reshape(-1, size).sum(axis=1)
    out = attention(spread(q), spread(k), spread(v), lengths=filled).swapaxes(1, 2).reshape(images, -1, heads, dim)
    return take_rows(out, pixels.slot).swapaxes(1, 2)


class QwenImages(Tower):
    """Images in the tower, as merges read them (`routing/tower.py`); traced, and what nobody asks for is not computed.
    Rows at padding mean nothing."""

    def __init__(self, tower: QwenTower, pixels: QwenPixels):
        self.tower, self.pixels = tower, jax.tree.map(jnp.asarray, pixels)
        self.states = tower.states(self.pixels)

    def features(self) -> Float[Array, "I n E"]:
        """Visual tokens in raster order, at decoder width."""
        return self.tower.merger(self.states[-1])

    def project(self, features: Float[Array, "I C E"]) -> Float[Array, "I C E"]:
        return features

    def metric(self) -> Float[Array, "I n"]:
        """Attention that a token's patches receive in the last block: mean over heads, sum over queries, mean over its
        patches (5.2)."""
        return self._received(len(self.states) - 1)

    def similarity(self, order: str) -> Float[Array, "I n E"]:
        """Mean of the middle blocks' patches, sent through the merger (5.2).

        order: "raster", or "window": the rows in the order of the attention windows, in which the released code reads
        them as if they were in raster order. Raises RerouteError for another one.
        """
        if order not in ("raster", "window"):
            raise RerouteError(f"unknown order {order!r} of similarity features: expected 'raster' or 'window'")
        group, similarity = self.tower.config.merge**2, self.tower.merger(middle_states(self.states))
        if order == "window":
            similarity = take_rows(similarity, jnp.argsort(self.pixels.slot[:, ::group], axis=1))
        return similarity

    def keys(self) -> Float[Array, "I n H"]:
        """Of the last block at their places, mean over heads and over a token's patches (16.2)."""
        block, normed, rope = self._block(len(self.states) - 1)
        _, keys, _ = block.attn.rotated(normed, rope)
        return self._by_token(keys.astype(jnp.float32).mean(axis=1))

    def objects(self) -> Float[Array, "I n"]:
        """Of the blocks that see the whole image, the one nearest block 16 of 32, counted from 1 (16.3)."""
        middle = round(16 * len(self.states) / 32) - 1
        return self._received(min(self.tower.config.full_attention, key=lambda block: abs(block - middle)))

    def registers(self) -> Float[Array, "I n"]:
        """The last block (16.3)."""
        return self._received(len(self.states) - 1)

    def _received(self, number: int) -> Float[Array, "I n"]:
        """Raises RerouteError for a block that attends within windows."""
        block = self.tower.layers[number]
        if block.attn.windowed:
            raise RerouteError(
                f"layer {number} of the vision tower attends within windows: this method reads full attention there, "
                f"and only layers {list(self.tower.config.full_attention)} have it; use another method"
            )
        _, normed, rope = self._block(number)
        q, k, _ = block.attn.rotated(normed, rope)
        return self._by_token(received_attention(q, k, self.pixels.count)[..., None])[..., 0]

    def _block(self, number: int) -> tuple[VisionLayer, Float[Array, "I P D"], Rope]:
        """A block, what its attention reads, and the patches' places."""
        block = self.tower.layers[number]
        before = self.states[number - 1] if number else self.tower.patch_embed(self.pixels.patches)
        return (
            block,
            block.norm1(before),
            rotary(self.pixels.place, self.tower.config.hidden_size // self.tower.config.num_heads),
        )

    def _by_token(self, patches: Float[Array, "I P X"]) -> Float[Array, "I n X"]:
        """Mean over the patches of each token."""
        images, _, width = patches.shape
        return patches.reshape(images, -1, self.tower.config.merge**2, width).mean(axis=2)


def middle_states(states: Sequence[Float[Array, "I P D"]]) -> Float[Array, "I P D"]:
    """The mean of the middle blocks' outputs, which Nuwa compares patches by (5.2)."""
    first, final, of = _SIMILARITY_SPAN
    span = states[first * len(states) // of : final * len(states) // of + 1]
    return jnp.stack(span).astype(jnp.float32).mean(axis=0).astype(states[0].dtype)
