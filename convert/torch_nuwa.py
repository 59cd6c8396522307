"""The image side of the torch reference: CLIP tower with explicit attention, Nuwa's merge (section 4), pooling."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from reroute_jax.routing.plan import NuwaMerge, PoolMerge

HIGH_QUANTILE = Fraction(55, 100)


def project_image(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """[n, D]: features of one image `[1, 3, H, W]` at the decoder's width, all patches in row-major order."""
    states, _ = clip_tower(model.model.vision_tower, pixels)
    return model.model.multi_modal_projector(states[model.config.vision_feature_layer][1:])


def merge_image(
    model: LlavaForConditionalGeneration, pixels: Tensor, merge: NuwaMerge | PoolMerge
) -> tuple[Tensor, Tensor]:
    """Projected features after the merge, and the patch index that gives each its position."""
    if isinstance(merge, PoolMerge):
        return pool(project_image(model, pixels), merge.rows, merge.cols)
    states, attention = clip_tower(model.model.vision_tower, pixels)
    depth = len(attention)
    features = states[model.config.vision_feature_layer][1:]
    metric = attention[depth - 2][:, 0, 1:].float().sum(dim=0)
    similarity = torch.stack(states[math.ceil(2 * depth / 3) :]).float().mean(dim=0)[1:]
    side = math.isqrt(len(features))
    merged, anchors = nuwa_stage_one(
        metric,
        features,
        similarity,
        columns=side,
        top_n=next((n for n in (1, 2, 3) if merge.budget <= Fraction(n, 9)), 4),
        keep=math.ceil(Fraction(7, 4) * merge.budget * len(features)),
        radius=math.sqrt(280) * side / 24,
        self_weight_override=merge.self_weight_override,
    )
    return model.model.multi_modal_projector(merged), anchors


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


def nuwa_stage_one(
    metric: Tensor,
    features: Tensor,
    similarity: Tensor,
    *,
    columns: int,
    top_n: int,
    keep: int,
    radius: float,
    self_weight_override: bool = True,
) -> tuple[Tensor, Tensor]:
    """Merged features [N1, C] and the anchors [N1], ascending: section 4.3 step by step, one patch at a time.

    metric [n], features [n, C], similarity [n, C'] in row-major order of a grid with `columns` columns. `keep` is
    limited to the number of candidates. The cells that pad an odd side score zero, below any real patch, and would be
    dropped again (5.3), so they are never made.
    """
    values = metric.tolist()
    candidates = _candidates(values, columns, top_n)
    anchors = sorted(sorted(candidates, key=lambda p: (-values[p], p))[:keep])
    threshold = _quantile(metric[anchors])
    unit = similarity / similarity.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    merged = []
    for anchor in anchors:
        if metric[anchor] >= threshold:
            weights = torch.zeros(len(values))
            weights[anchor] = (unit[anchor] @ unit[anchor]).relu()
        else:
            weights = (unit @ unit[anchor]).relu() * _penalty(anchor, len(values), columns, radius)
        weights = weights / (weights.sum() + 1e-8)
        if self_weight_override:
            weights[anchor] = 1.0
        merged.append(weights.to(features.dtype) @ features)
    return torch.stack(merged), torch.tensor(anchors)


def _candidates(values: list[float], columns: int, top_n: int) -> list[int]:
    """The `top_n` best patches of each 2x2 region; of equal ones the first in (dy, dx) order."""
    rows, chosen = len(values) // columns, []
    for top in range(0, rows, 2):
        for left in range(0, columns, 2):
            region = [
                columns * y + x for y in range(top, min(top + 2, rows)) for x in range(left, min(left + 2, columns))
            ]
            chosen += sorted(region, key=lambda p: -values[p])[:top_n]
    return chosen


def _penalty(anchor: int, count: int, columns: int, radius: float) -> Tensor:
    """[count]: 1 at the anchor, falling linearly with Euclidean distance to 0 at the radius."""
    y, x = divmod(anchor, columns)
    distance = [math.dist((y, x), divmod(patch, columns)) for patch in range(count)]
    return 1 - (torch.tensor(distance) / radius).clamp(max=1)


def _quantile(values: Tensor) -> Tensor:
    """Linear interpolation between the two sorted values around index 0.55 * (N - 1)."""
    ordered, place = values.sort().values, HIGH_QUANTILE * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return ordered[low] + float(place - low) * (ordered[high] - ordered[low])


def pool(features: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """[rows * cols, D] averages over the cells of a square grid, and the index of the patch in each cell's middle.

    Cell r covers floor(r * side / rows) to ceil((r + 1) * side / rows); of two middle patches it is the first.
    """
    side = math.isqrt(len(features))
    image = features.float().T.reshape(1, -1, side, side)
    pooled = nn.functional.adaptive_avg_pool2d(image, (rows, cols))[0].flatten(1).T.to(features.dtype)
    middle_rows, middle_cols = (
        [(r * side // cells + math.ceil((r + 1) * side / cells) - 1) // 2 for r in range(cells)]
        for cells in (rows, cols)
    )
    return pooled, torch.tensor([side * y + x for y in middle_rows for x in middle_cols])
