"""Tokens in groups by likeness to evenly spread targets: VisionZip's contextual tokens (16.2), proxies (15.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from reroute_jax.nn.layers import take_rows
from reroute_jax.routing.ops import compact_slots


def targets(rest: Bool[Array, "B n"], count: Int[Array, " B"]) -> tuple[Bool[Array, "B n"], Int[Array, "B n"]]:
    """Of the tokens of `rest` every `max(1, rest // count)`-th from the first on, `count` at most, and each one's
    number."""
    place, step = rest.cumsum(axis=1) - 1, jnp.maximum(1, rest.sum(axis=1) // jnp.maximum(count, 1))
    number, between = jnp.divmod(place, step[:, None])
    return rest & (between == 0) & (number < count[:, None]), number


def nearest(vectors: Float[Array, "B n X"], target: Bool[Array, "B n"], most: int) -> Int[Array, "B n"]:
    """Number, among the at most `most` targets, of the one that each token is most similar to by cosine in fp32; of
    equally similar ones the first."""
    wide = vectors.astype(jnp.float32)
    unit = wide / jnp.maximum(jnp.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)
    slots = compact_slots(target, most)
    likeness = jnp.einsum("BnX,BcX->Bnc", unit, take_rows(unit, slots), precision=jax.lax.Precision.HIGHEST)
    return jnp.where((slots < target.shape[1])[:, None], likeness, -jnp.inf).argmax(axis=2)


def group_means(
    values: Float[Array, "B n X"], group: Int[Array, "B n"], members: Bool[Array, "B n"], most: int
) -> Float[Array, "B most X"]:
    """fp32 mean of the `members` of each group, zeros where there are none."""
    inside = (group[..., None] == jnp.arange(most)) & members[..., None]
    wide = values.astype(jnp.float32)
    sums = jnp.einsum("Bnc,BnX->BcX", inside.astype(jnp.float32), wide, precision=jax.lax.Precision.HIGHEST)
    return sums / jnp.maximum(inside.sum(axis=1), 1)[..., None]
