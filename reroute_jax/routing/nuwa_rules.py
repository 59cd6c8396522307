"""How Nuwa differs between the model families that it was released for (sections 4 and 5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction


@dataclass(frozen=True)
class NuwaRules:
    """host_score: of its decision. quantile, diagonal_radius, self_weight_override: of its merge. first: layer of a
    decoder of `depth` layers before which it decides. fixed_counts: whether a decision keeps as many tokens of every
    image, and not a share. released: keep ratio -> (share after the merge, share of those kept by the decision,
    candidates per region).
    """

    host_score: str
    quantile: Fraction
    diagonal_radius: bool
    self_weight_override: bool
    first: int
    depth: int
    fixed_counts: bool
    released: Mapping[float, tuple[Fraction, float, int]] = field(default_factory=dict)

    def half(self, num_layers: int) -> int:
        return self.first * num_layers // self.depth
