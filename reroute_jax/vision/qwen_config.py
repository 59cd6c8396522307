"""The sizes of Qwen2.5-VL's vision tower."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QwenVisionConfig:
    """The vision transformer of Qwen2.5-VL (arXiv 2502.13923) and its patch merger. Images have any size.

    merge: side of the block of patches that becomes one visual token. window: side, in patches, of an attention
    window; the layers in `full_attention` see the whole image instead.
    """

    hidden_size: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    patch_size: int
    temporal_patch_size: int
    merge: int
    window: int
    full_attention: tuple[int, ...]

    @property
    def patch_values(self) -> int:
        """Numbers in one patch: channel, time, y, x."""
        return 3 * self.temporal_patch_size * self.patch_size**2
