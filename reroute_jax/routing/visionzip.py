"""VisionZip (CVPR 2025): the tokens that attract most attention, and averages of the rest (16.2)."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from reroute_jax.nn.layers import take_rows
from reroute_jax.routing.groups import group_means, nearest, targets
from reroute_jax.routing.kept import Kept
from reroute_jax.routing.ops import compact_slots, select
from reroute_jax.routing.tower import Tower
from reroute_jax.types import Grid


@dataclass(frozen=True)
class VisionZip(Kept):
    """Dominant tokens stay as they are. Of the others every n-th is a target; the rest join the target whose key
    is most similar, and their mean is added to it. Everything keeps its own place; the class token is left out."""

    def split(self, keep: int) -> tuple[int, int]:
        """(dominant, contextual) tokens of an image that keeps so many: 54 + 10 of 64, as released."""
        contextual = max(1, round(keep * 5 / 32))
        return keep - contextual, contextual

    def arrays(self, grid: Grid, tokens: int) -> dict[str, np.ndarray]:
        size = grid[0] * grid[1]
        dominant, contextual = self.split(self.anchors(size, grid))
        return {
            "size": np.array(size, np.int32),
            "dominant": np.array(dominant, np.int32),
            "contextual": np.array(contextual, np.int32),
        }

    def reduce(self, tower: Tower, arrays: dict[str, Array]) -> tuple[Float[Array, "I C E"], Int[Array, "I C"]]:
        features = tower.features()
        slots, cap = features.shape[1], self.cap(features.shape[1])
        inside = jnp.arange(slots) < arrays["size"][:, None]
        dominant = select(tower.metric(), inside, arrays["dominant"], cap)
        target, rank = targets(inside & ~dominant, arrays["contextual"])
        joined = join(features, tower.keys(), inside & ~dominant & ~target, target, rank, self.split(cap)[1])
        index = compact_slots(dominant | target, cap)
        return tower.project(take_rows(joined, index)), jnp.minimum(index, slots)


def join(
    features: Float[Array, "I n F"],
    keys: Float[Array, "I n H"],
    others: Bool[Array, "I n"],
    target: Bool[Array, "I n"],
    number: Int[Array, "I n"],
    most: int,
) -> Float[Array, "I n F"]:
    """The features, with the mean of the others that are most like it added to each target: of equally similar
    targets the first, and nothing to one that nobody joins. Means are fp32."""
    means = group_means(features, nearest(keys, target, most), others, most)
    added = jnp.where(target[..., None], take_rows(means, jnp.where(target, number, most)), 0)
    return (features.astype(jnp.float32) + added).astype(features.dtype)
