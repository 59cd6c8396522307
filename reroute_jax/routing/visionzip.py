"""VisionZip (CVPR 2025): the tokens that attract most attention, and averages of the rest (16.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from reroute_jax.errors import RerouteError, one_of
from reroute_jax.nn.layers import take_rows
from reroute_jax.routing.groups import group_means, nearest, targets
from reroute_jax.routing.kept import Kept, of_slots
from reroute_jax.routing.ops import compact_slots, select
from reroute_jax.routing.tower import Tower, TowerSizes
from reroute_jax.types import Grid

CLASS_TOKENS = ("drop", "keep")


@dataclass(frozen=True)
class VisionZip(Kept):
    """Dominant tokens stay as they are. Of the others every n-th is a target; the rest join the target whose key
    is most similar, and their mean is added to it.

    cls: "drop", everything keeps its own place; or "keep" as released: the class token comes first in the place of one
    dominant token, and targets come last. Then nothing has a place in the image.
    """

    cls: str = "drop"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("cls", self.cls, CLASS_TOKENS)

    @property
    def keeps_class(self) -> bool:
        return self.cls == "keep"

    def anchors(self, visual: int, grid: Grid) -> int:
        """Raises RerouteError where the class token would leave no dominant one."""
        keep = super().anchors(visual, grid)
        if self.keeps_class and self.split(keep)[0] < 2:
            raise RerouteError(f"VisionZip with cls='keep' leaves {keep} tokens, expected at least 3: keep more")
        return keep

    def split(self, keep: int) -> tuple[int, int]:
        """(dominant, contextual) tokens of an image that keeps so many: 54 + 10 of 64, as released."""
        contextual = max(1, round(keep * 5 / 32))
        return keep - contextual, contextual

    def arrays(self, grid: Grid, tokens: int) -> dict[str, np.ndarray]:
        size = grid[0] * grid[1]
        dominant, contextual = self.split(self.anchors(size, grid))
        return {
            "size": np.array(size, np.int32),
            "dominant": np.array(dominant - self.keeps_class, np.int32),
            "contextual": np.array(contextual, np.int32),
        }

    def reduce(self, tower: Tower, arrays: dict[str, Array]) -> tuple[Float[Array, "I C E"], Int[Array, "I C"]]:
        features = tower.features()
        found = self._grouped(tower, arrays, features.shape[1])
        joined = join(features, found, self.split(self.cap(features.shape[1]))[1])
        left = take_rows(joined, found.index)
        if self.keeps_class:
            left = left.at[:, 0].set(tower.class_features())
        return tower.project(left), found.index

    def members(self, tower: Tower, arrays: dict[str, Array]) -> Bool[Array, "I C n"]:
        """A dominant token stands for itself, a target for its group too."""
        tokens = tower.features().shape[1]
        found = self._grouped(tower, arrays, tokens)
        number = take_rows(jnp.where(found.target, found.number, -1), found.index)
        grouped = (number[..., None] == found.group[:, None]) & found.others[:, None]
        return of_slots(found.index, tokens) | grouped

    def macs(self, sizes: TowerSizes, grid: Grid) -> int:
        """Of the metric with its keys, and of the groups (20)."""
        visual = grid[0] * grid[1]
        dominant, contextual = self.split(self.anchors(visual, grid))
        groups = (visual - dominant + self.keeps_class) * contextual * (sizes.head_dim + sizes.features)
        return sizes.metric_macs(visual) + groups

    def _grouped(self, tower: Tower, arrays: dict[str, Array], tokens: int) -> Grouped:
        cap = self.cap(tokens)
        inside = jnp.arange(tokens) < arrays["size"][:, None]
        dominant = select(tower.metric(), inside, arrays["dominant"], cap)
        target, number = targets(inside & ~dominant, arrays["contextual"])
        group = nearest(tower.keys(), target, self.split(cap)[1])
        index = released_order(dominant, target, cap) if self.keeps_class else compact_slots(dominant | target, cap)
        return Grouped(jnp.minimum(index, tokens), target, number, group, inside & ~dominant & ~target)


def released_order(dominant: Bool[Array, "I n"], target: Bool[Array, "I n"], size: int) -> Int[Array, "I C"]:
    """The dominant tokens, then the targets, behind a slot for the class token, which repeats the first of them."""
    slots, dominants = jnp.arange(size), 1 + dominant.sum(axis=1, keepdims=True)
    first = jnp.pad(compact_slots(dominant, size - 1), ((0, 0), (1, 0)), mode="edge")
    behind = jnp.take_along_axis(compact_slots(target, size), jnp.maximum(slots - dominants, 0), axis=1)
    return jnp.where(slots < dominants, first, behind)


class Grouped(NamedTuple):
    """index: of the tokens that stay. target: the contextual ones, and each one's number. group: number of the target
    that a token is most like, which is read at the others."""

    index: Int[Array, "I C"]
    target: Bool[Array, "I n"]
    number: Int[Array, "I n"]
    group: Int[Array, "I n"]
    others: Bool[Array, "I n"]


def join(features: Float[Array, "I n F"], found: Grouped, most: int) -> Float[Array, "I n F"]:
    """The features, with the mean of the others of its group added to each target, nothing to one that nobody joins.
    Means are fp32."""
    means = group_means(features, found.group, found.others, most)
    added = jnp.where(found.target[..., None], take_rows(means, jnp.where(found.target, found.number, most)), 0)
    return (features.astype(jnp.float32) + added).astype(features.dtype)
