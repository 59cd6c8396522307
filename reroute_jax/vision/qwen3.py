"""The vision tower of Qwen3-VL (transformers' `qwen3_vl`): interpolated learned positions, 2-D rotary positions, full
attention within an image, and a patch merger behind the last block and behind each of DeepStack's (arXiv 2406.04334).

Patches keep the image processor's order throughout, so merged tokens come out in raster order.
Letters: I images, n merged tokens, P patches, D width, N heads, H head dim, E decoder width once for the features and
once for each level of DeepStack.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from reroute_jax.nn.attention import attention
from reroute_jax.nn.layers import Linear, Rope, parameter, traced_once
from reroute_jax.vision.clip import LayerNorm
from reroute_jax.vision.qwen3_packing import Qwen3Pixels
from reroute_jax.vision.qwen_config import Qwen3VisionConfig
from reroute_jax.vision.qwen_layers import NORM_EPS, RotaryAttention, rotary
from reroute_jax.vision.qwen_read import QwenRead


class VisionAttention(RotaryAttention):
    def __call__(self, x: Float[Array, "I P D"], rope: Rope, count: Int[Array, " I"]) -> Float[Array, "I P D"]:
        """Every patch sees the real patches of its image."""
        q, k, v = self.rotated(x, rope)
        return self.o(attention(q, k, v, lengths=count))


class VisionMLP(nnx.Module):
    def __init__(self, config: Qwen3VisionConfig, *, rngs: nnx.Rngs, dtype):
        keep = {"bias": True, "rngs": rngs, "dtype": dtype}
        self.fc1 = Linear(config.hidden_size, config.mlp_dim, ("embed", "mlp"), **keep)
        self.fc2 = Linear(config.mlp_dim, config.hidden_size, ("mlp", "embed"), **keep)

    def __call__(self, x: Float[Array, "I P D"]) -> Float[Array, "I P D"]:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=True))


class VisionLayer(nnx.Module):
    def __init__(self, config: Qwen3VisionConfig, *, rngs: nnx.Rngs, dtype):
        self.norm1 = LayerNorm(config.hidden_size, NORM_EPS, dtype=dtype)
        self.attn = VisionAttention(config, rngs=rngs, dtype=dtype)
        self.norm2 = LayerNorm(config.hidden_size, NORM_EPS, dtype=dtype)
        self.mlp = VisionMLP(config, rngs=rngs, dtype=dtype)

    @traced_once
    def __call__(self, x: Float[Array, "I P D"], rope: Rope, count: Int[Array, " I"]) -> Float[Array, "I P D"]:
        with jax.named_scope("attention"):
            x = x + self.attn(self.norm1(x), rope, count)
        with jax.named_scope("mlp"):
            return x + self.mlp(self.norm2(x))


class Merger(nnx.Module):
    """`merge^2` neighbouring patches to one token at decoder width.

    joined: whether the norm sees the patches of a token as one row (DeepStack's mergers), or each by itself.
    """

    def __init__(self, config: Qwen3VisionConfig, out: int, joined: bool, *, rngs: nnx.Rngs, dtype):
        width, keep = config.merge**2 * config.hidden_size, {"bias": True, "rngs": rngs, "dtype": dtype}
        self.norm = LayerNorm(width if joined else config.hidden_size, NORM_EPS, dtype=dtype)
        self.fc1 = Linear(width, width, ("embed", "mlp"), **keep)
        self.fc2 = Linear(width, out, ("mlp", "embed"), **keep)

    def __call__(self, x: Float[Array, "I P D"]) -> Float[Array, "I n out"]:
        normed = self.norm(x.reshape(x.shape[0], -1, self.norm.scale.shape[0]))
        groups = normed.reshape(x.shape[0], -1, self.fc1.kernel.shape[1])
        return self.fc2(jax.nn.gelu(self.fc1(groups), approximate=False))


class Qwen3Tower(nnx.Module):
    """Images of any size to visual tokens at width `out`, and as wide again for each level of DeepStack."""

    def __init__(self, config: Qwen3VisionConfig, out: int, *, rngs: nnx.Rngs, dtype):
        keep = {"rngs": rngs, "dtype": dtype}
        width, table = config.hidden_size, (config.table_side**2, config.hidden_size)
        self.config = config
        self.patch_embed = Linear(config.patch_values, width, (None, "embed"), bias=True, **keep)
        self.position_embed = parameter(rngs, table, (None, "embed"), dtype, width)
        self.layers = nnx.List([VisionLayer(config, **keep) for _ in range(config.num_layers)])
        self.merger = Merger(config, out, False, **keep)
        self.deepstack = nnx.List([Merger(config, out, True, **keep) for _ in config.deepstack])

    def states(self, pixels: Qwen3Pixels) -> list[Float[Array, "I P D"]]:
        """The patches before the first block and after each. At padding the numbers mean nothing."""
        rope, states = self.rope(pixels), [self.embedded(pixels)]
        for layer in self.layers:
            states.append(layer(states[-1], rope, pixels.count))
        return states

    def embedded(self, pixels: Qwen3Pixels) -> Float[Array, "I P D"]:
        """Patches with their learned positions, which are weighted and summed in fp32."""
        x = self.patch_embed(pixels.patches.astype(self.patch_embed.kernel.dtype))
        positions = (self.position_embed[pixels.taps] * pixels.weights[..., None]).sum(axis=2)
        return x + positions.astype(x.dtype)

    def rope(self, pixels: Qwen3Pixels) -> Rope:
        return rotary(pixels.place, self.config.hidden_size // self.config.num_heads)

    def merged(self, states: list[Float[Array, "I P D"]]) -> Float[Array, "I n E"]:
        """The features of `states`, and those of DeepStack's levels behind them."""
        levels = [
            merger(states[1 + block]) for merger, block in zip(self.deepstack, self.config.deepstack, strict=True)
        ]
        return jnp.concatenate([self.merger(states[-1]), *levels], axis=-1)


class Qwen3Images(QwenRead):
    """Of Qwen3-VL, at Qwen2.5-VL's places. Features hold DeepStack's behind a token's own."""

    def features(self) -> Float[Array, "I n E"]:
        return self.tower.merged(self.states)

    def objects(self) -> Float[Array, "I n"]:
        """The middle block (16.3)."""
        return self._received(self.middle)
