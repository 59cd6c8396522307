"""LLaVA's images in the torch reference: CLIP tower with explicit attention, projector, Nuwa as section 4 has it."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from convert.crosscheck.nuwa import ImageTensors, nuwa_stage_one, pool
from reroute_jax.routing.plan import NuwaMerge, PoolMerge


def positions(
    model: LlavaForConditionalGeneration, ids: Tensor, image_grid_thw: np.ndarray | None
) -> tuple[Tensor, int]:
    """Positions [1, S] of a prompt, and the next token's."""
    return torch.arange(len(ids))[None], len(ids)


def images(
    model: LlavaForConditionalGeneration,
    pixel_values: np.ndarray,
    image_grid_thw: np.ndarray | None,
    merge: NuwaMerge | PoolMerge | None,
) -> list[ImageTensors]:
    """Every image of pixels `[I, 3, H, W]` (or one, `[3, H, W]`) by itself."""
    pixels = torch.as_tensor(np.asarray(pixel_values)).to(model.dtype)
    return [_image(model, one[None], merge) for one in pixels.reshape(-1, *pixels.shape[-3:])]


def _image(model: LlavaForConditionalGeneration, pixels: Tensor, merge: NuwaMerge | PoolMerge | None) -> ImageTensors:
    states, attention = clip_tower(model.model.vision_tower, pixels)
    layers = model.config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else layers
    features = torch.cat([states[layer][1:] for layer in layers], dim=-1)
    count, project = len(features), model.model.multi_modal_projector
    grid = (math.isqrt(count), math.isqrt(count))
    if not isinstance(merge, NuwaMerge):
        features = project(features)
        kept = (features, torch.arange(count)) if merge is None else pool(features, grid, merge.cells(count, grid))
        return ImageTensors(*kept, grid)
    merged, anchors = _nuwa(features, states, attention, merge)
    return ImageTensors(project(merged), anchors, grid)


def _nuwa(features: Tensor, states: list[Tensor], attention: list[Tensor], merge: NuwaMerge) -> tuple[Tensor, Tensor]:
    """Stage 1 before the projector (4.2, 4.7)."""
    depth, side = len(attention), math.isqrt(len(features))
    return nuwa_stage_one(
        attention[depth - 2][:, 0, 1:].float().sum(dim=0),
        features,
        torch.stack(states[math.ceil(2 * depth / 3) :]).float().mean(dim=0)[1:],
        columns=side,
        top_n=merge.top_n,
        keep=math.ceil(merge.share * len(features)),
        radius=math.sqrt(280) * side / 24,
        quantile=merge.quantile,
        self_weight_override=merge.self_weight_override,
    )


def clip_tower(tower: nn.Module, pixels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Input of block 0 and each block's output [1 + n, C], and each block's attention [N, 1 + n, 1 + n] (4.2)."""
    x = tower.pre_layrnorm(tower.embeddings(pixels))[0]
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
