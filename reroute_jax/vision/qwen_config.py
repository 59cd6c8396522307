"""The sizes of the vision towers of Qwen2.5-VL and Qwen3-VL."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PatchedVisionConfig:
    """A vision transformer for images of any size, in patches. merge: side of the block of patches that becomes one
    visual token."""

    hidden_size: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    patch_size: int
    temporal_patch_size: int
    merge: int

    @property
    def patch_values(self) -> int:
        """Numbers in one patch: channel, time, y, x."""
        return 3 * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class QwenVisionConfig(PatchedVisionConfig):
    """That of Qwen2.5-VL (arXiv 2502.13923) and its patch merger. window: side, in patches, of an attention window; the
    layers in `full_attention` see the whole image instead."""

    window: int
    full_attention: tuple[int, ...]


@dataclass(frozen=True)
class Qwen3VisionConfig(PatchedVisionConfig):
    """That of Qwen3-VL and its patch mergers. table_side: of the square of learned positions. deepstack: the blocks,
    ascending, behind each of which a merger makes features for the decoder's first layers."""

    table_side: int
    deepstack: tuple[int, ...]
