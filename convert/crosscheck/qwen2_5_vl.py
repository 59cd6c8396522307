"""Qwen2.5-VL's images and positions in the torch reference: the tower with explicit attention and masks instead of
reordered patches, Nuwa as section 5 has it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from convert.crosscheck.merges import bicubic, reduced
from convert.crosscheck.nuwa import ImageTensors
from reroute_jax.routing.merge import Merge

Grid = tuple[int, int]


def positions(
    model: Qwen2_5_VLForConditionalGeneration, ids: Tensor, image_grid_thw: np.ndarray | None
) -> tuple[Tensor, int]:
    """M-RoPE positions [3, S] of a prompt, by transformers' own rule, and the next token's."""
    if image_grid_thw is None:
        return torch.arange(len(ids)).expand(3, -1), len(ids)
    is_image = (ids == model.config.image_token_id).int()
    found, delta = model.model.get_rope_index(
        ids[None], mm_token_type_ids=is_image[None], image_grid_thw=torch.as_tensor(np.asarray(image_grid_thw))
    )
    return found[:, 0], len(ids) + int(delta)


def images(
    model: Qwen2_5_VLForConditionalGeneration,
    pixel_values: np.ndarray,
    image_grid_thw: np.ndarray,
    merge: Merge | None,
    read: Callable[..., Any] | None = None,
) -> list[ImageTensors]:
    """Every image of `[P, values]` patches by itself; `image_grid_thw [I, 3]` counts patches. read: one image in the
    tower, None for `QwenImage`."""
    pixels, merged = torch.as_tensor(np.asarray(pixel_values)).to(model.dtype), model.model.visual.spatial_merge_size
    grids = [(rows, cols) for _, rows, cols in np.asarray(image_grid_thw).tolist()]
    parts = pixels.split([rows * cols for rows, cols in grids])
    return [
        reduced(merge, (read or QwenImage)(model, part, (rows // merged, cols // merged)))
        for part, (rows, cols) in zip(parts, grids, strict=True)
    ]


class QwenImage:
    """One image in the tower (5.2, 16): features are what leaves the patch merger."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, patches: Tensor, grid: Grid):
        self.model, self.tower, self.patches, self.grid = model, model.model.visual, patches, grid
        self.states, self.attention = self.run()
        self.depth = len(self.states)

    def run(self) -> tuple[list[Tensor], list[Tensor]]:
        return vision_tower(self.tower, self.patches, self.grid)

    def resized(self, cells: Grid, back: bool) -> QwenImage:
        """The same image in (rows, cols) tokens; back: and at its old size again."""
        side, merge = self.tower.patch_size, self.tower.spatial_merge_size
        image = image_of(self.patches, self.grid, side, merge)
        smaller = bicubic(image, tuple(count * side * merge for count in cells))
        grid, image = (self.grid, bicubic(smaller, image.shape[2:])) if back else (cells, smaller)
        return type(self)(self.model, patches_of(image, grid, side, merge), grid)

    def features(self) -> Tensor:
        return self.tower.merger(self.states[-1])

    def project(self, features: Tensor) -> Tensor:
        return features

    def metric(self) -> Tensor:
        return self._received(self.depth - 1)

    def similarity(self, order: str) -> Tensor:
        span = self.states[7 * self.depth // 32 : 23 * self.depth // 32 + 1]
        similarity = self.tower.merger(torch.stack(span).mean(dim=0))
        if order == "window":
            # The released code never puts these rows back in raster order.
            similarity = similarity[window_of(self.tower, self.grid).argsort(stable=True)]
        return similarity.float()

    def radius(self) -> float:
        rows, cols = (side + side % 2 for side in self.grid)
        return 0.8 * math.sqrt((rows - 1) ** 2 + (cols - 1) ** 2)

    def keys(self) -> Tensor:
        block = self.tower.blocks[-1]
        _, k, _ = block.attn.qkv(block.norm1(self.states[-2])).unflatten(-1, (3, block.attn.num_heads, -1)).unbind(1)
        turned = rotate(k.transpose(0, 1), *rotary(self.tower, self.grid)).float().mean(dim=0)
        return turned.unflatten(0, (-1, self.tower.spatial_merge_size**2)).mean(dim=1)

    def objects(self) -> Tensor:
        middle = round(16 * self.depth / 32) - 1
        return self._received(min(self.tower.fullatt_block_indexes, key=lambda block: abs(block - middle)))

    def registers(self) -> Tensor:
        return self._received(self.depth - 1)

    def _received(self, block: int) -> Tensor:
        patches = self.attention[block].mean(dim=0).sum(dim=0)
        return patches.reshape(-1, self.tower.spatial_merge_size**2).mean(dim=1)


def image_of(patches: Tensor, grid: Grid, side: int, merge: int) -> Tensor:
    """`[1, 3, H, W]` of an image's patches `[P, values]`, one patch at a time; frames are alike."""
    image = torch.zeros(1, 3, *(count * merge * side for count in grid))
    for (y, x), patch in zip(places(grid, merge), patches, strict=True):
        image[0, :, y * side : (y + 1) * side, x * side : (x + 1) * side] = patch.reshape(3, -1, side, side)[:, 0]
    return image


def patches_of(image: Tensor, grid: Grid, side: int, merge: int) -> Tensor:
    """The way back, to two frames."""
    cut = [image[0, :, y * side : (y + 1) * side, x * side : (x + 1) * side] for y, x in places(grid, merge)]
    return torch.stack([patch[:, None].expand(-1, 2, -1, -1).flatten() for patch in cut])


def vision_tower(tower: nn.Module, patches: Tensor, grid: Grid) -> tuple[list[Tensor], list[Tensor]]:
    """Each block's output [P, C] and attention [N, P, P] (fp32), for one image whose patches come in
    groups, one a merged token in raster order of the (rows, cols) `grid`."""
    group = tower.spatial_merge_size**2
    window = window_of(tower, grid).repeat_interleave(group)
    elsewhere = window[:, None] != window
    local = [number not in tower.fullatt_block_indexes for number in range(len(tower.blocks))]
    return blocks(tower, tower.patch_embed(patches), grid, [elsewhere if here else None for here in local])


def blocks(
    tower: nn.Module, x: Tensor, grid: Grid, unseen: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    """As `vision_tower`, from the embedded patches on. unseen: by block the patches [P, P] that each does not see."""
    cos, sin = rotary(tower, grid)
    states, attention = [], []
    for block, hidden in zip(tower.blocks, unseen, strict=True):
        module = block.attn
        q, k, v = module.qkv(block.norm1(x)).unflatten(-1, (3, module.num_heads, -1)).permute(1, 2, 0, 3)
        logits = (rotate(q, cos, sin) @ rotate(k, cos, sin).transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        if hidden is not None:
            logits = logits.masked_fill(hidden, -torch.inf)
        weights = torch.softmax(logits, dim=-1)
        x = x + module.proj((weights.to(v.dtype) @ v).transpose(0, 1).flatten(1))
        x = x + block.mlp(block.norm2(x))
        states.append(x)
        attention.append(weights)
    return states, attention


def window_of(tower: nn.Module, grid: Grid) -> Tensor:
    """[rows * cols]: number of the attention window of each merged token; windows count in raster order and are cut off
    at the lower and the right edge."""
    side = tower.window_size // tower.patch_size // tower.spatial_merge_size
    across = math.ceil(grid[1] / side)
    return torch.tensor([y // side * across + x // side for y in range(grid[0]) for x in range(grid[1])])


def places(grid: Grid, merge: int) -> list[tuple[int, int]]:
    """Row and column of each patch of an image of (rows, cols) merged tokens, one group of patches after the other."""
    return [
        (merge * y + dy, merge * x + dx)
        for y in range(grid[0])
        for x in range(grid[1])
        for dy in range(merge)
        for dx in range(merge)
    ]


def rotary(tower: nn.Module, grid: Grid) -> tuple[Tensor, Tensor]:
    """cos and sin [P, H]: the first quarter of a head's dimensions turns with the patch's row, the second with its
    column, and the other half repeats them."""
    half = tower.config.hidden_size // tower.config.num_heads // 2
    frequencies = 1 / 10000 ** (torch.arange(0, half, 2).float() / half)
    angles = (torch.tensor(places(grid, tower.spatial_merge_size))[..., None] * frequencies).flatten(1).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
