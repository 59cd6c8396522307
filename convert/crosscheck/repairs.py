"""Tokens that wait while a stage runs without them, in PyTorch (15.2): one prompt, one group at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from convert.crosscheck.layers import RaggedRows


def groups(hidden: Tensor, count: int) -> list[list[int]]:
    """Members, by rank, of the groups of waiting tokens `hidden [R, D]`, the seed of each first: seeds stand evenly
    among them, and each other token joins the seed that it is most similar to, of equals the first."""
    step = max(1, len(hidden) // count)
    found = [[rank] for rank in range(0, len(hidden), step)][:count]
    unit = hidden.float() / hidden.float().norm(dim=-1, keepdim=True)
    seeds = [members[0] for members in found]
    for rank in range(len(hidden)):
        if rank not in seeds:
            found[int((unit[seeds] @ unit[rank]).argmax())].append(rank)
    return found


class ProxyBypass:
    """Proxies of the rows `waiting` (indices) of a decision's input, for a prompt of `visual` tokens."""

    def __init__(self, rows: RaggedRows, waiting: Tensor, chosen: Tensor, visual: int):
        found = groups(rows.hidden[waiting], max(1, visual // 32)) if len(waiting) else []
        self.members: Sequence[Tensor] = [waiting[members] for members in found]
        self.positions = rows.position
        self.places = [int(rows.origin[members[0]]) for members in self.members]
        means = [rows.hidden[members].float().mean(dim=0) for members in self.members]
        self.inserted = [mean.to(rows.hidden.dtype) for mean in means]
        self.now = list(self.inserted)

    def joined(self, running: RaggedRows) -> RaggedRows:
        """The running rows with the proxies, each at its seed's place and position; it is nobody's origin and no visual
        token."""
        if not self.members:
            return running
        seeds = torch.stack([members[0] for members in self.members])
        none = torch.full((len(seeds),), -1)
        place = torch.cat([running.origin, torch.tensor(self.places)])
        self.order = place.argsort(stable=True)
        return RaggedRows(
            torch.cat([running.hidden, torch.stack(self.now)]),
            torch.cat([running.position, self.positions[:, seeds]], dim=1),
            torch.cat([running.origin, none]),
            torch.cat([running.visual, none]),
        ).take(self.order)

    def without_proxies(self, output: Tensor) -> Tensor:
        """A layer's outputs of the running rows; those of the proxies are kept."""
        if not self.members:
            return output
        back = output[self.order.argsort()]
        self.now = list(back[-len(self.members) :])
        return back[: -len(self.members)]

    def repaired(self, rows: RaggedRows) -> RaggedRows:
        """Every token that waited moves as its proxy did."""
        hidden = rows.hidden.clone()
        for members, first, last in zip(self.members, self.inserted, self.now, strict=True):
            hidden[members] = (rows.hidden[members].float() + last.float() - first.float()).to(hidden.dtype)
        return RaggedRows(hidden, rows.position, rows.origin, rows.visual, rows.deepstack)


class MeanBypass:
    """Nothing runs for the rows that wait, and they move as layers moved the chosen ones on the average."""

    def __init__(self, rows: RaggedRows, waiting: Tensor, chosen: Tensor, visual: int):
        self.waiting, self.moved = waiting, torch.zeros(rows.hidden.shape[1])

    def joined(self, running: RaggedRows) -> RaggedRows:
        self.running = running
        return running

    def without_proxies(self, output: Tensor) -> Tensor:
        visual = self.running.visual >= 0
        self.moved = self.moved + (output.float() - self.running.hidden.float())[visual].mean(dim=0)
        return output

    def repaired(self, rows: RaggedRows) -> RaggedRows:
        hidden = rows.hidden.clone()
        hidden[self.waiting] = (hidden[self.waiting].float() + self.moved).to(hidden.dtype)
        return RaggedRows(hidden, rows.position, rows.origin, rows.visual, rows.deepstack)


BYPASSES = {"proxy_offset": ProxyBypass, "mean_offset": MeanBypass}
