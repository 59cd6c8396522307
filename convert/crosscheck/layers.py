"""The decoder of a routed run in PyTorch: transformers' own norms, projections, MLPs and rotary tables, eager attention
over ragged rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class RaggedRows:
    """Tokens in sequence order. hidden [T, D]; the rest int64.

    position [C, T]: rotary positions, three channels with M-RoPE, else one; origin [T]: index in the unpruned prompt;
    visual [T]: original visual index over the prompt's images, -1 for text and for images that are not routed.
    deepstack [T, levels * D]: what is added to a row behind each of the first layers, zeros for text; or None.
    """

    hidden: Tensor
    position: Tensor
    origin: Tensor
    visual: Tensor
    deepstack: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def take(self, index: Tensor) -> RaggedRows:
        deepstack = None if self.deepstack is None else self.deepstack[index]
        return RaggedRows(
            self.hidden[index], self.position[:, index], self.origin[index], self.visual[index], deepstack
        )

    def added(self, layer: int, index: Tensor) -> RaggedRows:
        """With the features of DeepStack that belong behind `layer`, at the rows `index` alone."""
        width = self.hidden.shape[1]
        if self.deepstack is None or (layer + 1) * width > self.deepstack.shape[1]:
            return self
        hidden = self.hidden.clone()
        hidden[index] += self.deepstack[index, layer * width : (layer + 1) * width]
        return replace(self, hidden=hidden)


def run_layer(
    model: PreTrainedModel, layer: int, rows: RaggedRows, unseen: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Outputs [T, D] of one layer, and its keys and values [N, T, H]. `unseen [T, T]`: what a row may not attend to."""
    q, k, v = project(model, layer, rows)
    return finish_layer(model, layer, rows.hidden, attend(q, k, v, unseen)), (k, v)


def unseen_rows(count: int, bidirectional: bool) -> Tensor:
    """Causal in sequence order, unless the layer is one that Nuwa's release leaves without a mask (5.4)."""
    return torch.ones(count, count, dtype=torch.bool).triu(count if bidirectional else 1)


def attend(q: Tensor, k: Tensor, v: Tensor, unseen: Tensor | None = None) -> Tensor:
    """Explicit attention `[T, N * H]` of `q [N, T, H]` to `k, v [N, S, H]`; `unseen [T, S]` marks what to leave out."""
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if unseen is not None:
        logits = logits.masked_fill(unseen, -torch.inf)
    weights = torch.softmax(logits.float(), dim=-1).to(v.dtype)
    return (weights @ v).transpose(0, 1).flatten(1)


def project(
    model: PreTrainedModel, layer: int, rows: RaggedRows, rotated: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each [N, T, H], q and k at their positions or without; key and value heads repeated to the query
    heads."""
    decoder = model.model.language_model
    attention, x = decoder.layers[layer].self_attn, decoder.layers[layer].input_layernorm(rows.hidden)
    heads = [
        projection(x).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    ]
    if hasattr(attention, "q_norm"):
        heads[:2] = attention.q_norm(heads[0]), attention.k_norm(heads[1])
    # Transformers' tables want [B, T], with M-RoPE [3, B, T].
    has_channels = "mrope_section" in decoder.config.rope_parameters
    position = rows.position.expand(3, -1)[:, None] if has_channels else rows.position
    cos, sin = (table[0] for table in decoder.rotary_emb(x, position))
    q, k, v = heads
    if rotated:
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    repeats = len(q) // len(k)
    return q, k.repeat_interleave(repeats, dim=0), v.repeat_interleave(repeats, dim=0)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def finish_layer(model: PreTrainedModel, layer: int, x: Tensor, attended: Tensor) -> Tensor:
    module = model.model.language_model.layers[layer]
    x = x + module.self_attn.o_proj(attended)
    return x + module.mlp(module.post_attention_layernorm(x))


def head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    return model.lm_head(model.model.language_model.norm(hidden)).float()


def attention_weights(model: PreTrainedModel, layer: int, rows: RaggedRows, unseen: Tensor) -> Tensor:
    """[N, T, T] fp32: the whole attention map of one layer."""
    q, k, _ = project(model, layer, rows)
    logits = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
    return torch.softmax(logits.masked_fill(unseen, -torch.inf), dim=-1)
