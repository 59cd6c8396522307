"""Attention of query rows over key rows, by the backend that fits the target of the lowering, dtype and shape.

On a CUDA GPU cuDNN's flash attention takes what it can (16-bit, no mask but lengths and the triangle). All else is
XLA's, where the logits of a block of queries are in memory at a time.
Letters as in `layers`; R: queries of all heads that share a KV head, one head after the other.
"""

from __future__ import annotations

import logging
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from reroute_jax.nn.cache import Int8Rows, KVRows
from reroute_jax.nn.precision import precision
from reroute_jax.nn.sharding import per_device

log = logging.getLogger("reroute_jax")

# Queries that attend at a time on the CPU under the triangle, and in loops.
QUERY_BLOCK = 128
# Most blocks of the triangle that are written out one by one, each without the keys behind it.
TRIANGLE_BLOCKS = 16
# Queries that attend at a time on an accelerator under the triangle; more than these go in loops everywhere.
LONG = 1024
_HIDDEN = np.finfo(np.float32).min


def attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "#B #T S"] | None = None,
    *,
    lengths: Int[Array, " B"] | None = None,
    causal: bool = False,
) -> Float[Array, "B N T H"]:
    """Softmax attention, fp32 logits and softmax; query head h reads KV head h // (N / K).

    mask: keys that a query sees (None: all), never together with the others. lengths: real rows of each batch entry,
    which stand first; what padding sees means nothing. causal: query t sees keys 0 to t.
    """
    if mask is not None:
        return per_device(_blocked, q, k, v, mask)
    return per_device(partial(_unmasked, causal=causal), q, k, v, lengths)


def cached_attention(
    q: Float[Array, "B N 1 H"], k: KVRows, v: KVRows, visible: Bool[Array, "B S"]
) -> Float[Array, "B N 1 H"]:
    """`attention` of one token a row over what a cache holds of it."""
    return per_device(_attend_int8 if isinstance(k, Int8Rows) else _attend, q, k, v, visible[:, None])


def _unmasked(q, k, v, lengths: Int[Array, " B"] | None, *, causal: bool) -> Float[Array, "B N T H"]:
    targets = {}
    if causal and q.shape[2] > QUERY_BLOCK:
        targets["cpu"] = partial(_causal, block=QUERY_BLOCK)
    if q.dtype != jnp.float32 and _cudnn_takes(q.shape, k.shape, q.dtype.name):
        targets["cuda"] = partial(_cudnn, causal=causal)
    xla = partial(_causal, block=LONG) if causal else _whole
    return jax.lax.platform_dependent(q, k, v, lengths, **targets, default=xla) if targets else xla(q, k, v, lengths)


@cache
def _cudnn_takes(queries: tuple[int, ...], keys: tuple[int, ...], dtype: str) -> bool:
    """Whether cuDNN is here and takes this shape, which tracing it tells."""
    q, kv = jax.ShapeDtypeStruct(queries, dtype), jax.ShapeDtypeStruct(keys, dtype)
    shape = f"attention of {dtype} queries {list(queries)} over keys {list(keys)} on a CUDA GPU"
    try:
        jax.eval_shape(partial(_cudnn, causal=True), q, kv, kv, jax.ShapeDtypeStruct(queries[:1], jnp.int32))
    except (RuntimeError, NotImplementedError) as reason:
        log.info("%s: XLA, because of cuDNN: %s", shape, reason)
        return False
    log.info("%s: cuDNN", shape)
    return True


def _cudnn(q, k, v, lengths: Int[Array, " B"] | None, *, causal: bool) -> Float[Array, "B N T H"]:
    rows_first = (x.swapaxes(1, 2) for x in (q, k, v))
    seen = jax.nn.dot_product_attention(
        *rows_first,
        is_causal=causal,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return seen.swapaxes(1, 2)


def _whole(q, k, v, lengths: Int[Array, " B"] | None) -> Float[Array, "B N T H"]:
    """Every query sees every real key."""
    return _blocked(q, k, v, None if lengths is None else (jnp.arange(k.shape[2]) < lengths[:, None])[:, None])


def _causal(q, k, v, lengths: Int[Array, " B"] | None, *, block: int) -> Float[Array, "B N T H"]:
    """The triangle, which hides padding from every real query, by blocks of up to `block` queries: a block leaves out
    the keys behind it, and on a CPU its logits stay in the processor's cache: 640 slots, 16 heads in 13 ms, not 28
    (fp32, 2 cores, jax 0.10.2, November 2026). An accelerator has nothing of small blocks but the time to compile them.
    """
    slots = q.shape[2]
    count = min(-(-slots // block), TRIANGLE_BLOCKS)
    size = -(-slots // count)
    blocks = []
    for start in range(0, slots, size):
        stop = min(start + size, slots)
        mask = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)
        blocks.append(_blocked(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], mask[None]))
    return jnp.concatenate(blocks, axis=2)


def _blocked(q, k, v, mask: Bool[Array, "#B #T S"] | None) -> Float[Array, "B N T H"]:
    """`_attend`, for many queries by blocks of them, so that logits take memory linear in the slots."""
    if q.shape[2] <= LONG:
        return _attend(q, k, v, mask)
    queries = _query_blocks(q, 2)
    if mask is None or mask.shape[1] == 1:
        seen = jax.lax.map(lambda block: _attend(block, k, v, mask), queries)
    else:
        seen = jax.lax.map(lambda blocks: _attend(blocks[0], k, v, blocks[1]), (queries, _query_blocks(mask, 1)))
    return jnp.moveaxis(seen, 0, 2).reshape(*q.shape[:2], -1, q.shape[3])[:, :, : q.shape[2]]


def _query_blocks(x: Array, axis: int) -> Array:
    """Blocks of QUERY_BLOCK along `axis`, filled up with zeros, in front of all axes."""
    count = -(-x.shape[axis] // QUERY_BLOCK)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, count * QUERY_BLOCK - x.shape[axis])
    split = (*x.shape[:axis], count, QUERY_BLOCK, *x.shape[axis + 1 :])
    return jnp.moveaxis(jnp.pad(x, padding).reshape(split), axis, 0)


def _attend(q, k, v, mask: Bool[Array, "#B #T S"] | None) -> Float[Array, "B N T H"]:
    return _weighted(q, _masked_logits(q, k, mask), v)


def _attend_int8(q, k: Int8Rows, v: Int8Rows, mask: Bool[Array, "#B #T S"]) -> Float[Array, "B N T H"]:
    """Products see the 8-bit numbers, which every dtype of a model holds exactly: a key has one scale, and so has a
    value, so that they multiply logits and weights instead."""
    logits = _masked_logits(q, k.numbers.astype(q.dtype), mask, k.scales)
    return _weighted(q, logits, v.numbers.astype(q.dtype), v.scales)


def _weighted(
    q, logits: Float[Array, "B K R S"], v, scales: Float[Array, "B K S"] | None = None
) -> Float[Array, "B N T H"]:
    """The mean of `v * scales` by the softmax of the logits. Normalised behind the product with the values, as flash
    attention does: H numbers a row to divide instead of S."""
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    if scales is not None:
        # As shares of the largest: small weights times small scales would be too small for fp16.
        largest = scales.max(axis=-1)[..., None, None]
        weights, total = weights * (scales[:, :, None] / largest), total / largest
    seen = jnp.einsum(
        "BKRS,BKSH->BKRH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32, precision=precision(v)
    )
    return (seen / total).astype(v.dtype).reshape(q.shape)


def query_probabilities(
    q: Float[Array, "B N Q H"], k: Float[Array, "B K S H"], mask: Bool[Array, "B _ S"]
) -> Float[Array, "B N Q S"]:
    """Attention of a few queries over all keys, in fp32 from the product on."""
    return per_device(_probabilities, q, k, mask)


def _probabilities(q, k, mask: Bool[Array, "B _ S"]) -> Float[Array, "B N Q S"]:
    wide = _masked_logits(q.astype(jnp.float32), k.astype(jnp.float32), mask)
    return jax.nn.softmax(wide, axis=-1).reshape(q.shape[:3] + k.shape[2:3])


def received_attention(
    q: Float[Array, "B N T H"], k: Float[Array, "B N T H"], lengths: Int[Array, " B"]
) -> Float[Array, "B T"]:
    """Attention that each key receives, fp32: mean over heads, sum over real queries; 0 at padding."""
    return per_device(_received, q, k, lengths).mean(axis=1)


def _received(q, k, lengths: Int[Array, " B"]) -> Float[Array, "B N T"]:
    real = jnp.arange(k.shape[2]) < lengths[:, None]

    def add(total: Float[Array, "B N T"], block: tuple[Array, Array]) -> tuple[Float[Array, "B N T"], None]:
        queries, counts = block
        probabilities = _probabilities(queries, k, real[:, None])
        return total + jnp.where(counts[:, None, :, None], probabilities, 0).sum(axis=2), None

    start = jnp.zeros(k.shape[:3], jnp.float32)
    total, _ = jax.lax.scan(add, start, (_query_blocks(q, 2), _query_blocks(real, 1)))
    return jnp.where(real[:, None], total, 0)


def _masked_logits(
    q, k, mask: Bool[Array, "#B #T S"] | None, scales: Float[Array, "B K S"] | None = None
) -> Float[Array, "B K R S"]:
    """scales: of the keys, where they have any."""
    batch, heads, slots, dim = q.shape
    group = heads // k.shape[1]
    rows = q.reshape(batch, k.shape[1], group * slots, dim)
    product = {"preferred_element_type": jnp.float32, "precision": precision(q, k)}
    logits = jnp.einsum("BKRH,BKSH->BKRS", rows, k, **product) * dim**-0.5
    if scales is not None:
        logits = logits * scales[:, :, None]
    if mask is None:
        return logits
    of_heads = mask if mask.shape[1] == 1 else jnp.tile(mask, (1, group, 1))
    return jnp.where(of_heads[:, None], logits, _HIDDEN)
