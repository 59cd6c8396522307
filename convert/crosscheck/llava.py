"""LLaVA's images in the torch reference: CLIP tower with explicit attention, projector."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from convert.crosscheck.merges import Grid, bicubic, reduced
from convert.crosscheck.nuwa import ImageTensors
from reroute_jax.routing.merge import Merge


def positions(
    model: LlavaForConditionalGeneration, ids: Tensor, image_grid_thw: np.ndarray | None
) -> tuple[Tensor, int]:
    """Positions [1, S] of a prompt, and the next token's."""
    return torch.arange(len(ids))[None], len(ids)


def images(
    model: LlavaForConditionalGeneration,
    pixel_values: np.ndarray,
    image_grid_thw: np.ndarray | None,
    merge: Merge | None,
) -> list[ImageTensors]:
    """Every image of pixels `[I, 3, H, W]` (or one, `[3, H, W]`) by itself."""
    pixels = torch.as_tensor(np.asarray(pixel_values)).to(model.dtype)
    return [reduced(merge, LlavaImage(model, one[None])) for one in pixels.reshape(-1, *pixels.shape[-3:])]


class LlavaImage:
    """One image in the CLIP tower (4.2, 16): features are what enters the projector."""

    def __init__(self, model: LlavaForConditionalGeneration, pixels: Tensor):
        self.model, self.pixels = model, pixels
        self.states, self.attention = clip_tower(model.model.vision_tower, pixels)
        self.depth, self.side = len(self.attention), model.config.vision_config.patch_size
        self.grid = (pixels.shape[2] // self.side, pixels.shape[3] // self.side)

    def resized(self, cells: Grid, back: bool) -> LlavaImage:
        """The same image in (rows, cols) patches; back: and at its old size again."""
        smaller = bicubic(self.pixels, tuple(count * self.side for count in cells))
        return LlavaImage(self.model, bicubic(smaller, self.pixels.shape[2:]) if back else smaller)

    def features(self) -> Tensor:
        layers = self.model.config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        return torch.cat([self.states[layer][1:] for layer in layers], dim=-1)

    def class_features(self) -> Tensor:
        layers = self.model.config.vision_feature_layer
        return torch.cat([self.states[layer][0] for layer in ([layers] if isinstance(layers, int) else layers)])

    def project(self, features: Tensor) -> Tensor:
        return self.model.model.multi_modal_projector(features)

    def metric(self) -> Tensor:
        return self.attention[self.depth - 2][:, 0, 1:].float().sum(dim=0)

    def similarity(self, order: str) -> Tensor:
        return torch.stack(self.states[math.ceil(2 * self.depth / 3) :]).float().mean(dim=0)[1:]

    def radius(self) -> float:
        return math.sqrt(280) * self.grid[0] / 24

    def keys(self) -> Tensor:
        block = self.model.model.vision_tower.encoder.layers[self.depth - 2]
        keys = block.self_attn.k_proj(block.layer_norm1(self.states[self.depth - 2]))
        return keys.unflatten(-1, (block.self_attn.num_heads, -1)).float().mean(dim=1)[1:]

    def objects(self) -> Tensor:
        return self._received(round(9 * self.depth / 24) - 1)

    def registers(self) -> Tensor:
        return self._received(self.depth - 2)

    def _received(self, block: int) -> Tensor:
        return self.attention[block].float().mean(dim=(0, 1))[1:]


def clip_tower(tower: nn.Module, pixels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Input of block 0 and each block's output [1 + n, C], and each block's attention [N, 1 + n, 1 + n] (4.2)."""
    x = tower.pre_layrnorm(tower.embeddings(pixels, interpolate_pos_encoding=True))[0]
    states, attention = [x], []
    for block in tower.encoder.layers:
        module, y = block.self_attn, block.layer_norm1(x)
        q, k, v = (
            projection(y).unflatten(-1, (module.num_heads, -1)).transpose(0, 1)
            for projection in (module.q_proj, module.k_proj, module.v_proj)
        )
        weights = torch.softmax((q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5, dim=-1)
        attended = (weights.to(v.dtype) @ v).transpose(0, 1).flatten(1)
        x = x + module.out_proj(attended)
        x = x + block.mlp(block.layer_norm2(x))
        states.append(x)
        attention.append(weights)
    return states, attention
