"""Qwen3-VL's images and positions in the torch reference: the tower with explicit attention, positions interpolated one
patch at a time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration

from convert.crosscheck import qwen2_5_vl
from convert.crosscheck.merges import reduced
from convert.crosscheck.nuwa import ImageTensors
from reroute_jax.routing.merge import Merge

Grid = tuple[int, int]


def positions(
    model: Qwen3VLForConditionalGeneration, ids: Tensor, image_grid_thw: np.ndarray | None
) -> tuple[Tensor, int]:
    """M-RoPE positions [3, S] of a prompt, by transformers' own rule, and the next token's."""
    return qwen2_5_vl.positions(model, ids, image_grid_thw)


def images(
    model: Qwen3VLForConditionalGeneration,
    pixel_values: np.ndarray,
    image_grid_thw: np.ndarray,
    merge: Merge | None,
) -> list[ImageTensors]:
    """Every image of `[P, values]` patches by itself; `image_grid_thw [I, 3]` counts patches."""
    pixels, merged = torch.as_tensor(np.asarray(pixel_values)).to(model.dtype), model.model.visual.spatial_merge_size
    grids = [(rows, cols) for _, rows, cols in np.asarray(image_grid_thw).tolist()]
    parts = pixels.split([rows * cols for rows, cols in grids])
    return [
        reduced(merge, Qwen3Image(model, part, (rows // merged, cols // merged)))
        for part, (rows, cols) in zip(parts, grids, strict=True)
    ]


class Qwen3Image(qwen2_5_vl.QwenImage):
    """One image in the tower: what merges read on Qwen2.5-VL in this tower's places. The features of DeepStack stand
    behind a token's own, so that a merge takes both with the same weights."""

    def __init__(self, model: Qwen3VLForConditionalGeneration, patches: Tensor, grid: Grid):
        self.tower, self.patches, self.grid = model.model.visual, patches, grid
        self.states, self.attention = vision_tower(self.tower, patches, grid)
        self.depth = len(self.states)

    def features(self) -> Tensor:
        levels = zip(self.tower.deepstack_merger_list, self.tower.deepstack_visual_indexes, strict=True)
        own = self.tower.merger(self.states[-1])
        return torch.cat([own, *(merger(self.states[block]) for merger, block in levels)], dim=1)

    def objects(self) -> Tensor:
        return self._received(max(0, round(16 * self.depth / 32) - 1))


def vision_tower(tower: nn.Module, patches: Tensor, grid: Grid) -> tuple[list[Tensor], list[Tensor]]:
    """Each block's output [P, C] and attention [N, P, P] (fp32), for one image whose patches come in
    groups, one a merged token in raster order of the (rows, cols) `grid`."""
    cos, sin = qwen2_5_vl.rotary(tower, grid)
    x, states, attention = tower.patch_embed(patches) + table_positions(tower, grid), [], []
    for block in tower.blocks:
        module = block.attn
        q, k, v = module.qkv(block.norm1(x)).unflatten(-1, (3, module.num_heads, -1)).permute(1, 2, 0, 3)
        q, k = (qwen2_5_vl.rotate(part, cos, sin) for part in (q, k))
        weights = torch.softmax((q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5, dim=-1)
        x = x + module.proj((weights.to(v.dtype) @ v).transpose(0, 1).flatten(1))
        x = x + block.mlp(block.norm2(x))
        states.append(x)
        attention.append(weights)
    return states, attention


def table_positions(tower: nn.Module, grid: Grid) -> Tensor:
    """[P, C]: the learned position of each patch, between the four of the table that surround its place when the
    corners of the image lie on those of the table."""
    side, table = tower.num_grid_per_side, tower.pos_embed.weight.float()
    last = [max(tower.spatial_merge_size * count - 1, 1) for count in grid]
    found = []
    for place in qwen2_5_vl.places(tower, grid):
        (y, dy), (x, dx) = (divmod(at * (side - 1) / most, 1) for at, most in zip(place, last, strict=True))
        low, right = min(int(y) + 1, side - 1), min(int(x) + 1, side - 1)
        corner = {(int(y), int(x)): (1 - dy) * (1 - dx)}
        for cell, share in (((int(y), right), (1 - dy) * dx), ((low, int(x)), dy * (1 - dx)), ((low, right), dy * dx)):
            corner[cell] = corner.get(cell, 0.0) + share
        found.append(sum(share * table[side * row + column] for (row, column), share in corner.items()))
    return torch.stack(found).to(tower.pos_embed.weight.dtype)
