"""How decisions rank in PyTorch (2.1, 5.4, 13): one function a score, on one sample, with whole attention maps."""

from __future__ import annotations

import torch
from torch import Tensor


def head_mean(logits: Tensor) -> Tensor:
    """[T] fp32: softmax of `[N, T]` over all keys, then the plain mean over heads (2.1)."""
    return torch.softmax(logits.float(), dim=-1).mean(dim=0)


def last_three(weights: Tensor) -> Tensor:
    """[T] fp32: of `[N, T, T]` the mean over the last three query rows, then the maximum over heads (5.4)."""
    return weights[:, -3:].float().mean(dim=1).max(dim=0).values


def last_token(q: Tensor, k: Tensor, among: Tensor) -> Tensor:
    """[T] fp32: attention of the last row of `q [N, T, H]` to the rows of `k` that are `among [T]`, 0 to others (2.1,
    13.1); rotated or not as q and k are (13.2)."""
    logits = (k.float() @ q[:, -1, :, None].float())[..., 0] * q.shape[-1] ** -0.5
    return head_mean(logits.masked_fill(~among, -torch.inf))


def value_similarity(
    values: Tensor, queries: Tensor, candidates: Tensor, among: Tensor, seeds: int
) -> tuple[Tensor, Tensor]:
    """[T] fp32 scores and the indices of the seeds (13.3), of values `[N, T, H]`.

    queries: indices of text rows. candidates [T]: whose scores count. among [T]: rows that the softmax is over.
    """
    logits = values.float() @ values.float().transpose(-1, -2) * values.shape[-1] ** -0.5
    weights = torch.softmax(logits.masked_fill(~among, -torch.inf), dim=-1).mean(dim=0)
    first = weights[queries].mean(dim=0)
    best = torch.argsort(first.masked_fill(~candidates, -torch.inf), descending=True, stable=True)[:seeds]
    return weights[torch.cat([queries, best])].mean(dim=0), best


def text_queries(origin: Tensor, behind: int) -> Tensor:
    """Indices of the rows from the third behind the image on; else of all behind it; else of the last row (13.3).

    origin [T]: place of each row in the unpruned prompt. behind: the place behind the last routed visual token.
    """
    for start in (behind + 2, behind):
        if (origin >= start).any():
            return (origin >= start).nonzero()[:, 0]
    return torch.tensor([len(origin) - 1])


def hidden_change(before: Tensor, after: Tensor) -> Tensor:
    """[T] fp32: Euclidean distance of two `[T, D]` (13.4)."""
    return (after.float() - before.float()).square().sum(dim=-1).sqrt()
