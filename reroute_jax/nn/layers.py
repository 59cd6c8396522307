"""Building blocks of the decoder.

Letters: B batch, T query slots, S key slots, D width, N heads, K KV heads, G = N/K, H head dim, F MLP width.
Heads stand before slots everywhere: a decode step then reads each head's cached keys as one contiguous block.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from reroute_jax.config import DecoderConfig
from reroute_jax.nn.attention import attention, cached_attention, query_probabilities
from reroute_jax.nn.cache import KVRows, write_rows, write_slots
from reroute_jax.nn.products import barrier_on_cpu, matmul
from reroute_jax.nn.quantised import plain
from reroute_jax.nn.sharding import constrain

# For what equal layers run: traced for the first of them and each new shape, and no call in the program. A routed
# prefill of 32 layers and its decode step take 1.9 s to trace instead of 3.4 (2 cores, jax 0.10.2, November 2026).
traced_once = partial(jax.jit, inline=True)


class Rope(NamedTuple):
    """Rotary factors, fp32 always: bf16 cannot tell position 257 from 256."""

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]


def parameter(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype, fan_in: int) -> nnx.Param:
    """A normally initialised weight with its logical axis names, one a dimension."""
    return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) / math.sqrt(fan_in), axes=axes)


def constant(value: float, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype) -> nnx.Param:
    return nnx.Param(jnp.full(shape, value, dtype), axes=axes)


class RMSNorm(nnx.Module):
    def __init__(self, width: int, eps: float, *, axis: str | None = "embed", dtype):
        self.scale = constant(1.0, (width,), (axis,), dtype)
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.scale


class Linear(nnx.Module):
    """`x @ kernel.T (+ bias)`. axes: of inputs and outputs."""

    def __init__(self, inputs: int, outputs: int, axes: tuple[str | None, str], *, bias: bool, rngs: nnx.Rngs, dtype):
        self.kernel = parameter(rngs, (outputs, inputs), axes[::-1], dtype, inputs)
        self.bias = constant(0.0, (outputs,), axes[1:], dtype) if bias else None
        self.axis = axes[1]

    def __call__(self, x: Float[Array, "*rows I"]) -> Float[Array, "*rows O"]:
        y = matmul(x, plain(self.kernel.get_value()))
        y = y if self.bias is None else y + self.bias
        return constrain(y, "rows", *[None] * (y.ndim - 2), self.axis)


class HeadProjection(nnx.Module):
    """Width to heads."""

    def __init__(self, width: int, heads: int, head_dim: int, axis: str, *, bias: bool, rngs: nnx.Rngs, dtype):
        self.kernel = parameter(rngs, (heads, head_dim, width), (axis, None, "embed"), dtype, width)
        self.bias = constant(0.0, (heads, head_dim), (axis, None), dtype) if bias else None
        self.axis = axis

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B N T H"]:
        heads, dim, width = self.kernel.shape
        kernel = plain(self.kernel.get_value()).reshape(heads * dim, width)
        y = matmul(x, kernel).reshape(*x.shape[:2], heads, dim).swapaxes(1, 2)
        return constrain(y if self.bias is None else y + self.bias[:, None], "rows", self.axis)


class OutputProjection(nnx.Module):
    """Heads back to width."""

    def __init__(self, heads: int, head_dim: int, width: int, *, bias: bool, rngs: nnx.Rngs, dtype):
        self.kernel = parameter(rngs, (width, heads, head_dim), ("embed", "heads", None), dtype, heads * head_dim)
        self.bias = constant(0.0, (width,), ("embed",), dtype) if bias else None

    def __call__(self, x: Float[Array, "B N T H"]) -> Float[Array, "B T D"]:
        width, heads, dim = self.kernel.shape
        rows = x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], heads * dim)
        y = matmul(rows, plain(self.kernel.get_value()).reshape(width, heads * dim))
        return constrain(y if self.bias is None else y + self.bias, "rows")


def rotate(x: Float[Array, "B N T H"], rope: Rope) -> Float[Array, "B N T H"]:
    """Apply rotary factors in the half-split layout of LLaMA."""
    wide = x.astype(jnp.float32)
    cos = jnp.concatenate([rope.cos, rope.cos], axis=-1)[:, None]
    sin = jnp.concatenate([-rope.sin, rope.sin], axis=-1)[:, None]
    return (wide * cos + jnp.roll(wide, x.shape[-1] // 2, axis=-1) * sin).astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype):
        width, dim = config.hidden_size, config.head_dim
        keep = {"rngs": rngs, "dtype": dtype}
        self.q = HeadProjection(width, config.num_heads, dim, "heads", bias=config.qkv_bias, **keep)
        self.k = HeadProjection(width, config.num_kv_heads, dim, "kv_heads", bias=config.qkv_bias, **keep)
        self.v = HeadProjection(width, config.num_kv_heads, dim, "kv_heads", bias=config.qkv_bias, **keep)
        self.o = OutputProjection(config.num_heads, dim, width, bias=False, **keep)
        self.q_norm = RMSNorm(dim, config.norm_eps, axis=None, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(dim, config.norm_eps, axis=None, dtype=dtype) if config.qk_norm else None

    def queries(self, x: Float[Array, "B T D"]) -> Float[Array, "B N T H"]:
        """Before they are rotated."""
        q = self.q(x)
        return q if self.q_norm is None else self.q_norm(q)

    def keys(self, x: Float[Array, "B T D"]) -> Float[Array, "B K T H"]:
        """Before they are rotated."""
        k = self.k(x)
        return k if self.k_norm is None else self.k_norm(k)


class GatedMLP(nnx.Module):
    def __init__(self, width: int, inner: int, *, bias: bool, rngs: nnx.Rngs, dtype):
        keep = {"bias": bias, "rngs": rngs, "dtype": dtype}
        self.gate = Linear(width, inner, ("embed", "mlp"), **keep)
        self.up = Linear(width, inner, ("embed", "mlp"), **keep)
        self.down = Linear(inner, width, ("mlp", "embed"), **keep)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP. Caches come in as arguments and go out as results."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype):
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.attn = Attention(config, rngs=rngs, dtype=dtype)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.mlp = GatedMLP(config.hidden_size, config.mlp_dim, bias=False, rngs=rngs, dtype=dtype)

    @traced_once
    def prefill(
        self,
        x: Float[Array, "B T D"],
        rope: Rope,
        mask: Bool[Array, "#B #T T"] | None,
        keys: Float[Array, "B K T H"] | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B K T H"], Float[Array, "B K T H"]]:
        """Run the layer on whole rows; returns the new rows, keys and values. A mask of None is the plain triangle.
        keys: this layer's, if known. lengths: real rows of each batch entry, which stand first."""
        with jax.named_scope("attention"):
            normed = self.attn_norm(x)
            q = rotate(self.attn.queries(normed), rope)
            k = rotate(self.attn.keys(normed), rope) if keys is None else keys
            v = self.attn.v(normed)
            seen = attention(q, k, v, causal=True, lengths=lengths) if mask is None else attention(q, k, v, mask)
            x = x + self.attn.o(seen)
        return self._mlp_residual(x), k, v

    @traced_once
    def decode(
        self,
        x: Float[Array, "B 1 D"],
        rope: Rope,
        keys: KVRows,
        values: KVRows,
        slots: Int[Array, " B"],
        visible: Bool[Array, "B S"],
    ) -> tuple[Float[Array, "B 1 D"], KVRows, KVRows]:
        """Run one token a row, writing its key and value at the row's slot of the cache; `visible` includes it."""
        with jax.named_scope("attention"):
            normed = self.attn_norm(x)
            q = rotate(self.attn.queries(normed), rope)
            new_k = rotate(self.attn.keys(normed), rope)
            keys = write_slots(keys, new_k, slots)
            values = write_slots(values, self.attn.v(normed), slots)
            # Without the barrier XLA's CPU backend writes twice, for the product and for the result, and copies the
            # whole cache to do so.
            keys, values = barrier_on_cpu((keys, values))
            x = x + self.attn.o(cached_attention(q, keys, values, visible))
        return self._mlp_residual(x), keys, values

    @traced_once
    def extend(
        self,
        x: Float[Array, "B S D"],
        rope: Rope,
        keys: Float[Array, "B K T H"],
        values: Float[Array, "B K T H"],
        slots: Int[Array, "B S"],
        visible: Bool[Array, "B S T"],
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B K T H"], Float[Array, "B K T H"]]:
        """Run rows behind others whose keys and values are known, writing theirs at their slots, in front of which
        `visible` shows all; slots out of range are padding."""
        with jax.named_scope("attention"):
            normed = self.attn_norm(x)
            q = rotate(self.attn.queries(normed), rope)
            keys = write_rows(keys, rotate(self.attn.keys(normed), rope), slots)
            values = write_rows(values, self.attn.v(normed), slots)
            x = x + self.attn.o(attention(q, keys, values, visible))
        return self._mlp_residual(x), keys, values

    def probabilities(
        self,
        x: Float[Array, "B T D"],
        rope: Rope,
        queries: Int[Array, "B Q"],
        mask: Bool[Array, "B Q T"],
        rotated: bool = True,
    ) -> tuple[Float[Array, "B N Q T"], Float[Array, "B K T H"]]:
        """Attention of the rows at slots `queries` over all rows, fp32 from its product on, and the keys this took, at
        their positions. rotated: whether the attention sees positions."""
        with jax.named_scope("scoring"):
            normed = self.attn_norm(x)
            plain, q = self.attn.keys(normed), self.attn.queries(take_rows(normed, queries))
            k = rotate(plain, rope)
            if rotated:
                q = rotate(q, Rope(*(take_rows(table, queries) for table in rope)))
            return query_probabilities(q, k if rotated else plain, mask), k

    def _mlp_residual(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        with jax.named_scope("mlp"):
            return x + self.mlp(self.mlp_norm(x))


def take_rows(x: Array, slots: Int[Array, "B C"]) -> Array:
    """`x[b, slots[b]]`, zeros where a slot is out of range."""
    return jax.vmap(lambda row, index: row.at[index].get(mode="fill", fill_value=0))(x, slots)
