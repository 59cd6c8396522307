"""What reductions before the decoder read of a family's vision tower.

Letters: I images, n visual tokens of the largest one (a bucket), F features, E decoder width, H head dim.
"""

from __future__ import annotations

from jaxtyping import Array, Float


class Tower:
    """A batch of images in a vision tower, traced; nothing runs that is not asked for. Rows of attention are fp32."""

    def features(self) -> Float[Array, "I n F"]:
        """What a merge averages: on LLaVA in front of the projector, on Qwen behind the patch merger."""
        raise NotImplementedError

    def project(self, features: Float[Array, "I C F"]) -> Float[Array, "I C E"]:
        """Features at decoder width."""
        raise NotImplementedError

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
