"""What a decision ranks by and must keep, for one prompt in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from convert.crosscheck.floors import floor_of
from convert.crosscheck.layers import RaggedRows, attention_weights, project, run_layer, unseen_rows
from convert.crosscheck.scores import hidden_change, last_three, last_token, text_queries, value_similarity
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.stages import Stage

Grid = tuple[int, int]


@dataclass
class Given:
    """What a decision at the input of layer `stage.lo` is given. rows: that input, candidates [T]: of them, those that
    it may select; before: the input of the layer before, on the rows that ran it."""

    stage: Stage
    number: int
    keep: int
    rows: RaggedRows
    candidates: Tensor
    before: RaggedRows | None


class Decider:
    """The layers and decisions of one prompt. prior: fp32 [decisions, n] by original visual index. grids: of the
    images that are routed. rows: all of the prompt's at the decoder input."""

    def __init__(
        self,
        model: PreTrainedModel,
        schedule: Schedule,
        rows: RaggedRows,
        grids: Sequence[Grid],
        prior: np.ndarray | None,
    ):
        self.model, self.schedule, self.grids, self.prior = model, schedule, grids, prior
        visual = rows.visual >= 0
        self.positions, self.behind = rows.position[:, visual], behind(rows)
        self.change = torch.zeros(int(rows.origin.max()) + 1)
        self.seeds = torch.tensor([], dtype=torch.long)

    def layer(self, number: int, rows: RaggedRows) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Outputs and cache entry of a layer."""
        bidirectional = number == self.schedule.bidirectional_layer
        output, entry = run_layer(self.model, number, rows, unseen_rows(len(rows), bidirectional))
        own = rows.origin >= 0  # proxies are no rows of the prompt
        self.change[rows.origin[own]] = hidden_change(rows.hidden[own], output[own])
        return output, entry

    def score(self, given: Given) -> Tensor:
        """[T] fp32, read at the candidates."""
        return _RULES[given.stage.score](self, given)

    def floor(self, given: Given) -> Tensor:
        """[T]: rows that must be kept."""
        held, floor = torch.zeros(len(given.rows), dtype=torch.bool), given.stage.floor
        if floor is None:
            return held
        config = self.model.model.language_model.config
        theta, dim = config.rope_parameters["rope_theta"], self.model.model.language_model.layers[0].self_attn.head_dim
        indices = floor_of(floor, self.grids, self.positions, given.keep, theta, dim)
        held |= torch.isin(given.rows.visual, torch.tensor(indices, dtype=torch.long))
        if not floor.fixed:
            held[self.seeds] = True
        return held

    def last_token(self, given: Given, previous: bool = False, rotated: bool = True, visual: bool = False) -> Tensor:
        rows = given.before if previous else given.rows
        q, k, _ = project(self.model, given.stage.lo - previous, rows, rotated)
        return last_token(q, k, given.candidates if visual else torch.ones(len(rows), dtype=torch.bool))

    def last_three(self, given: Given) -> Tensor:
        layer, rows = given.stage.lo - 1, given.before
        unseen = unseen_rows(len(rows), layer == self.schedule.bidirectional_layer)
        return last_three(attention_weights(self.model, layer, rows, unseen))

    def values(self, given: Given, own: bool = False, visual: bool = True) -> Tensor:
        rows = given.rows if own else given.before
        values = project(self.model, given.stage.lo - (not own), rows)[2]
        visual_count = self.positions.shape[1]
        share = getattr(given.stage.floor, "seeds_share", 0)
        base = given.keep if getattr(given.stage.floor, "of_kept", False) else visual_count
        seeds = max(1, round(share * base)) if share else max(1, round(visual_count / 100))
        among = given.candidates if visual else torch.ones(len(rows), dtype=torch.bool)
        queries = text_queries(given.rows.origin, self.behind)
        scores, self.seeds = value_similarity(values, queries, given.candidates, among, seeds)
        return scores

    def moved(self, given: Given) -> Tensor:
        return self.change[given.rows.origin]

    def host(self, given: Given) -> Tensor:
        return torch.from_numpy(np.asarray(self.prior))[given.number][given.rows.visual.clamp(min=0)]


def behind(rows: RaggedRows) -> int:
    """Origin of the row behind the last routed visual token."""
    visual = (rows.visual >= 0).nonzero()[:, 0]
    following = int(visual.max()) + 1 if len(visual) else 0
    return int(rows.origin[following] if following < len(rows) else rows.origin[-1] + 1)


_RULES: dict[str, Callable[[Decider, Given], Tensor]] = {
    "last_token": Decider.last_token,
    "last_token_visual": lambda one, given: one.last_token(given, visual=True),
    "last_token_unrotated": lambda one, given: one.last_token(given, rotated=False, visual=True),
    "previous_layer": lambda one, given: one.last_token(given, previous=True),
    "previous_layer_unrotated": lambda one, given: one.last_token(given, previous=True, rotated=False, visual=True),
    "previous_layer_last_three": Decider.last_three,
    "value_similarity": Decider.values,
    "value_similarity_all_rows": lambda one, given: one.values(given, visual=False),
    "value_similarity_own": lambda one, given: one.values(given, own=True),
    "hidden_change": Decider.moved,
    "prior": Decider.host,
}
