"""What reductions before the decoder read of a family's vision tower.

Letters: I images, n visual tokens of the largest one (a bucket), F features, E decoder width, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Array, Float

from reroute_jax.errors import RerouteError


@dataclass(frozen=True)
class TowerSizes:
    """What the cost of a reduction depends on (20). width, head_dim: of the tower's blocks. patches: of a token.
    class_token: whether `metric` is one row of a map, and not a whole one. features, similarity, projected: widths of
    what `features`, `similarity` and `project` give. merger: multiply-accumulates of a token in the patch merger."""

    width: int
    head_dim: int
    patches: int
    class_token: bool
    features: int
    similarity: int
    projected: int
    merger: int = 0

    def received_macs(self, visual: int) -> int:
        """Of a map of attention between all patches, with its queries and keys."""
        rows = self.patches * visual
        return 2 * rows * self.width**2 + rows**2 * self.width

    def metric_macs(self, visual: int) -> int:
        """Of `metric`, whose keys `keys` takes over."""
        if self.class_token:
            return visual * self.width**2 + self.width**2 + visual * self.width
        return self.received_macs(visual)


class Tower:
    """A batch of images in a vision tower, traced; nothing runs that is not asked for. Rows of attention are fp32."""

    def features(self) -> Float[Array, "I n F"]:
        """What a merge averages: on LLaVA in front of the projector, on Qwen behind the patch merger."""
        raise NotImplementedError

    def project(self, features: Float[Array, "I C F"]) -> Float[Array, "I C E"]:
        """Features at decoder width."""
        raise NotImplementedError

    def class_features(self) -> Float[Array, "I F"]:
        """The same of the class token. Raises RerouteError for a tower without one."""
        raise RerouteError("this model's vision tower has no class token to keep: leave out cls='keep'")

    def metric(self) -> Float[Array, "I n"]:
        """Attention that ranks: of the class token in the second-to-last block (4.2), or received in the last (5.2)."""
        raise NotImplementedError

    def similarity(self, order: str) -> Float[Array, "I n K"]:
        """What Nuwa compares tokens by (4.2, 5.2)."""
        raise NotImplementedError

    def keys(self) -> Float[Array, "I n H"]:
        """Keys of the block that `metric` reads, fp32, mean over heads (16.2)."""
        raise NotImplementedError

    def objects(self) -> Float[Array, "I n"]:
        """Attention received in a middle block (16.3)."""
        raise NotImplementedError

    def registers(self) -> Float[Array, "I n"]:
        """Attention received in a late block (16.3)."""
        raise NotImplementedError
