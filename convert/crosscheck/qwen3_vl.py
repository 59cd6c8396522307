"""Qwen3-VL's images and positions in the torch reference: the tower with explicit attention, positions interpolated one
patch at a time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration

from convert.crosscheck import qwen2_5_vl
from convert.crosscheck.nuwa import ImageTensors
from reroute_jax.routing.merge import Merge

Grid = tuple[int, int]


# M-RoPE positions by transformers' own rule, which its model has as Qwen2.5-VL's does.
positions = qwen2_5_vl.positions


def images(
    model: Qwen3VLForConditionalGeneration, pixel_values: np.ndarray, image_grid_thw: np.ndarray, merge: Merge | None
) -> list[ImageTensors]:
    """As of Qwen2.5-VL."""
    return qwen2_5_vl.images(model, pixel_values, image_grid_thw, merge, Qwen3Image)


class Qwen3Image(qwen2_5_vl.QwenImage):
    """One image in the tower: what merges read on Qwen2.5-VL in this tower's places. The features of DeepStack stand
    behind a token's own, so that a merge takes both with the same weights."""

    def run(self) -> tuple[list[Tensor], list[Tensor]]:
        x = self.tower.patch_embed(self.patches) + table_positions(self.tower, self.grid)
        return qwen2_5_vl.blocks(self.tower, x, self.grid, [None] * len(self.tower.blocks))

    def features(self) -> Tensor:
        levels = zip(self.tower.deepstack_merger_list, self.tower.deepstack_visual_indexes, strict=True)
        own = self.tower.merger(self.states[-1])
        return torch.cat([own, *(merger(self.states[block]) for merger, block in levels)], dim=1)

    def objects(self) -> Tensor:
        return self._received(max(0, round(16 * self.depth / 32) - 1))


def table_positions(tower: nn.Module, grid: Grid) -> Tensor:
    """[P, C]: the learned position of each patch, between the four of the table that surround its place when the
    corners of the image lie on those of the table."""
    side, table = tower.num_grid_per_side, tower.pos_embed.weight.float()
    last = [max(tower.spatial_merge_size * count - 1, 1) for count in grid]
    found = []
    for place in qwen2_5_vl.places(grid, tower.spatial_merge_size):
        (y, dy), (x, dx) = (divmod(at * (side - 1) / most, 1) for at, most in zip(place, last, strict=True))
        low, right = min(int(y) + 1, side - 1), min(int(x) + 1, side - 1)
        corner = {(int(y), int(x)): (1 - dy) * (1 - dx)}
        for cell, share in (((int(y), right), (1 - dy) * dx), ((low, int(x)), dy * (1 - dx)), ((low, right), dy * dx)):
            corner[cell] = corner.get(cell, 0.0) + share
        found.append(sum(share * table[side * row + column] for (row, column), share in corner.items()))
    return torch.stack(found).to(tower.pos_embed.weight.dtype)
