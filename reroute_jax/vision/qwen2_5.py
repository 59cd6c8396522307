"""The vision tower of Qwen2.5-VL (arXiv 2502.13923): windowed attention, 2-D rotary positions, patch merger.

Patches keep the image processor's order throughout. Windowed layers gather queries, keys and values into windows and
gather the result back, so nothing else is permuted and merged tokens come out in raster order.
Letters: I images, n merged tokens, P patches, W windows, S patches a window, D width, N heads, H head dim, E decoder
width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from reroute_jax.errors import RerouteError
from reroute_jax.nn.attention import attention
from reroute_jax.nn.layers import (
    GatedMLP,
    Linear,
    RMSNorm,
    Rope,
    parameter,
    take_rows,
    traced_once,
)
from reroute_jax.nn.products import matmul
from reroute_jax.vision.qwen_config import QwenVisionConfig
from reroute_jax.vision.qwen_layers import NORM_EPS, RotaryAttention, rotary
from reroute_jax.vision.qwen_read import QwenRead
from reroute_jax.vision.qwen_windows import QwenPixels


class PatchEmbed(nnx.Module):
    """A convolution whose stride is its kernel: one matrix on a patch's values."""

    def __init__(self, config: QwenVisionConfig, *, rngs: nnx.Rngs, dtype):
        shape = (config.hidden_size, config.patch_values)
        self.kernel = parameter(rngs, shape, ("embed", None), dtype, config.patch_values)

    def __call__(self, patches: Float[Array, "I P values"]) -> Float[Array, "I P D"]:
        return matmul(patches.astype(self.kernel.dtype), self.kernel[...])


class VisionAttention(RotaryAttention):
    """Attention of an image's patches over the whole image, or over the window they stand in."""

    def __init__(self, config: QwenVisionConfig, windowed: bool, *, rngs: nnx.Rngs, dtype):
        super().__init__(config, rngs=rngs, dtype=dtype)
        self.windowed = windowed

    def __call__(self, x: Float[Array, "I P D"], rope: Rope, pixels: QwenPixels) -> Float[Array, "I P D"]:
        q, k, v = self.rotated(x, rope)
        return self.o(window_attention(q, k, v, pixels) if self.windowed else image_attention(q, k, v, pixels))


class VisionLayer(nnx.Module):
    def __init__(self, config: QwenVisionConfig, windowed: bool, *, rngs: nnx.Rngs, dtype):
        width = config.hidden_size
        self.norm1 = RMSNorm(width, NORM_EPS, dtype=dtype)
        self.attn = VisionAttention(config, windowed, rngs=rngs, dtype=dtype)
        self.norm2 = RMSNorm(width, NORM_EPS, dtype=dtype)
        self.mlp = GatedMLP(width, config.mlp_dim, bias=True, rngs=rngs, dtype=dtype)

    @traced_once
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
        """The patches before the first block and after each. At padding the numbers mean nothing."""
        pixels = jax.tree.map(jnp.asarray, pixels)
        rope, states = self.rope(pixels), [self.patch_embed(pixels.patches)]
        for layer in self.layers:
            states.append(layer(states[-1], rope, pixels))
        return states

    def rope(self, pixels: QwenPixels) -> Rope:
        return rotary(pixels.place, self.config.hidden_size // self.config.num_heads)

    def features(self, pixels: QwenPixels) -> Float[Array, "I n E"]:
        """Visual tokens in raster order; of image i the first `count[i] / merge^2` are real."""
        return self.merger(self.states(pixels)[-1])


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


class QwenImages(QwenRead):
    """Of Qwen2.5-VL, where a method reads full attention."""

    def features(self) -> Float[Array, "I n E"]:
        return self.tower.merger(self.states[-1])

    def similarity(self, order: str) -> Float[Array, "I n E"]:
        """order: "raster", or "window": the rows in the order of the attention windows, in which the released code
        reads them as if they were in raster order (5.2). Raises RerouteError for another one."""
        if order not in ("raster", "window"):
            raise RerouteError(f"unknown order {order!r} of similarity features: expected 'raster' or 'window'")
        similarity = super().similarity(order)
        if order == "window":
            group = self.tower.config.merge**2
            similarity = take_rows(similarity, jnp.argsort(self.pixels.slot[:, ::group], axis=1))
        return similarity

    def objects(self) -> Float[Array, "I n"]:
        """Of the blocks that see the whole image, the one nearest block 16 of 32, counted from 1 (16.3)."""
        return self._received(min(self.tower.config.full_attention, key=lambda block: abs(block - self.middle)))

    def _received(self, number: int) -> Float[Array, "I n"]:
        """Raises RerouteError for a block that attends within windows."""
        if self.tower.layers[number].attn.windowed:
            raise RerouteError(
                f"layer {number} of the vision tower attends within windows: this method reads full attention there, "
                f"and only layers {list(self.tower.config.full_attention)} have it; use another method"
            )
        return super()._received(number)
