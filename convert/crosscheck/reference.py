"""Routed models in PyTorch, the slow and obvious way: one sample, eager, ragged. The yardstick of the JAX code.

Written from the method specification and from nothing else: deletion really removes rows, reroute really leaves
deferred rows out of every layer, and each layer's cache holds just the rows that ran. The loop and the routing are this
file's; `layers.py` has the layers, `decisions.py` what decisions rank by. What differs between the families, images and
positions, is in the file of this folder that is called as the family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from convert.crosscheck.decisions import Decider, Given
from convert.crosscheck.layers import RaggedRows, attend, finish_layer, head, project
from convert.crosscheck.merges import smaller_grid
from convert.crosscheck.nuwa import ImageTensors
from convert.crosscheck.repairs import BYPASSES
from reroute_jax.routing.downsample import Downsample
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.stages import Stage


@dataclass(frozen=True)
class EagerDecision:
    """scores: fp32 [n] by original visual index, -inf where not a candidate; selected: original indices, ascending."""

    layer: int
    scores: np.ndarray
    selected: np.ndarray


@dataclass
class Walk:
    """What a prefill did. By layer: the rows it ran on, their outputs, its cache entry, decode's first position."""

    decisions: list[EagerDecision] = field(default_factory=list)
    ran: list[np.ndarray] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    cache: list = field(default_factory=list)
    next_position: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """Everything comparable about one run. Arrays are numpy, real ones fp32.

    features: [n, D] features of all images as the decoder gets them, DeepStack's behind them; None without an image.
    anchors: original visual index of each of them after a merge, else None. members: those that each was made of.
    ran: per layer the rows cached in prefill, as indices into the unpruned prompt. hidden: their outputs, before
    DeepStack adds to them.
    logits: [vocab] at the last prompt token; tokens: greedy continuation, the stop token included.
    """

    features: np.ndarray | None
    anchors: np.ndarray | None
    members: list[np.ndarray] | None
    decisions: list[EagerDecision]
    ran: list[np.ndarray]
    hidden: list[np.ndarray]
    logits: np.ndarray
    tokens: list[int]


@torch.no_grad()
def run(
    model: PreTrainedModel,
    input_ids: np.ndarray,
    pixel_values: np.ndarray | None = None,
    schedule: Schedule | None = None,
    *,
    image_grid_thw: np.ndarray | None = None,
    prior: np.ndarray | None = None,
    max_new_tokens: int = 0,
    eos_tokens: Sequence[int] = (),
    repetition_penalty: float = 1.0,
) -> Reference:
    """Prefill one unpadded prompt `input_ids [S]` under a schedule, then decode greedily.

    pixel_values: its images as the processor gives them, in order (LLaVA `[I, 3, H, W]`, Qwen `[P, values]`), or None;
    without an image nothing is routed (9.4). image_grid_thw: `[I, 3]`, Qwen's patch grids.
    prior: fp32 [decisions, n] by original visual index, for stages with score="prior".
    Raises ValueError unless the prompt has one run of image tokens for each image, as long as its features.
    """
    ids = torch.as_tensor(np.asarray(input_ids)).long()
    schedule = schedule or Schedule((Stage(0, len(model.model.language_model.layers)),))
    images = encode(model, pixel_values, image_grid_thw, schedule)
    walk, logits = prefill(model, ids, images, image_grid_thw, schedule, prior)
    merged = bool(images) and schedule.merge is not None
    return Reference(
        features=torch.cat([image.features for image in images]).float().numpy() if images else None,
        anchors=_visual_index(images).numpy() if merged else None,
        members=_members(images) if merged else None,
        decisions=walk.decisions,
        ran=walk.ran,
        hidden=[hidden.float().numpy() for hidden in walk.hidden],
        logits=logits.numpy(),
        tokens=decode(model, ids, logits, walk, max_new_tokens, eos_tokens, repetition_penalty),
    )


# --- The three steps of a run -----------------------------------------------------------------------------------------


def encode(
    model: PreTrainedModel, pixel_values: np.ndarray | None, image_grid_thw: np.ndarray | None, schedule: Schedule
) -> list[ImageTensors]:
    """The prompt's images, as many tokens as the schedule's merge leaves of each."""
    if pixel_values is None:
        return []
    return _family_of(model).images(model, pixel_values, image_grid_thw, schedule.merge)


def prefill(
    model: PreTrainedModel,
    ids: Tensor,
    images: Sequence[ImageTensors],
    image_grid_thw: np.ndarray | None,
    schedule: Schedule,
    prior: np.ndarray | None,
) -> tuple[Walk, Tensor]:
    """The record of a prompt `ids [S]`, and fp32 logits `[vocab]` at its last token."""
    runs = _image_runs(ids == model.config.image_token_id, [image.count for image in images])
    positions, next_position = _family_of(model).positions(model, ids, image_grid_thw)
    if isinstance(schedule.merge, Downsample) and image_grid_thw is not None:
        positions, next_position = _positions_of_smaller(model, ids, positions, images, runs, schedule.merge)
    rows = _decoder_input(model, ids, positions, images, runs, schedule.first_image_only)

    if schedule.renumbers_input:
        rows, next_position = replace(rows, position=torch.arange(len(rows))[None]), len(rows)
    grids = [image.grid for image in images]
    decider = Decider(model, schedule, rows, grids[:1] if schedule.first_image_only else grids, prior)
    visual = sum(image.count for image in images)
    rows, walk = route(rows, schedule, decider.layer, decider.score, visual, next_position, decider.floor)
    cut(walk, schedule.cut_caches)
    return walk, head(model, rows.hidden[-1])


def decode(
    model: PreTrainedModel,
    ids: Tensor,
    logits: Tensor,
    walk: Walk,
    max_new_tokens: int,
    eos_tokens: Sequence[int],
    penalty: float,
) -> list[int]:
    """Greedy tokens (2.5): a new token enters every layer's cache and sees all that is there, without a mask."""
    cache, seen, tokens = list(walk.cache), set(ids.tolist()), []
    while len(tokens) < max_new_tokens:
        token = int(penalised(logits, seen, penalty).argmax())
        tokens.append(token)
        seen.add(token)
        if token in eos_tokens or len(tokens) == max_new_tokens:
            break
        x = model.model.language_model.embed_tokens(torch.tensor([token]))
        for layer, start in enumerate(walk.next_position):
            position = torch.tensor([start + len(tokens) - 1])
            q, *new = project(model, layer, RaggedRows(x, position[None], position, position))
            keys, values = cache[layer] = tuple(torch.cat(pair, dim=1) for pair in zip(cache[layer], new, strict=True))
            x = finish_layer(model, layer, x, attend(q, keys, values))
        logits = head(model, x[0])
    return tokens


def _family_of(model: PreTrainedModel) -> ModuleType:
    """The file of the model's family, with `images` and `positions`."""
    return import_module(f"convert.crosscheck.{model.config.model_type}")


# --- Routing (sections 2, 3, 6) ---------------------------------------------------------------------------------------


def route(
    rows: RaggedRows,
    schedule: Schedule,
    layer_fn: Callable[[int, RaggedRows], tuple[Tensor, object]],
    score_fn: Callable[[Given], Tensor],
    original: int,
    next_position: int,
    floor_fn: Callable[[Given], Tensor] | None = None,
) -> tuple[RaggedRows, Walk]:
    """Walk the layers; returns the rows that are left (for reroute all of them) and the record.

    `layer_fn(layer, rows)` gives outputs and a cache entry; `score_fn(given)` a score for every row; `floor_fn(given)`
    the rows that must be kept, asked after the score. original: visual tokens before any merge. next_position: of the
    first generated token, until renumbering changes it.
    """
    allowed, active, before = rows.visual >= 0, torch.arange(len(rows)), None
    count, walk, bypass = int(allowed.sum()), Walk(), None
    for stage in schedule.stages:
        decides = stage.decides and count > 0
        if decides:
            if bypass is not None:
                rows = bypass.repaired(rows)
            kept = len(walk.decisions[-1].selected) if stage.of_kept and walk.decisions else count
            keep = min(keep_count(stage, kept), int(allowed.sum()))
            given = Given(stage, len(walk.decisions), keep, rows, allowed, before)
            scores = score_fn(given).float().masked_fill(~allowed, -torch.inf)
            held = torch.zeros(len(rows), dtype=torch.bool) if floor_fn is None else floor_fn(given) & allowed
            chosen = choose(scores, held, keep, stage.union)
            walk.decisions.append(_decision(stage, rows, scores, chosen, original))
            runs = rows.visual < 0
            runs[chosen] = True
            active, bypass = runs.nonzero()[:, 0], None
            if stage.repair is not None and stage is not schedule.stages[-1]:
                bypass = BYPASSES[stage.repair](rows, (allowed & ~runs).nonzero()[:, 0], chosen, count)
            if stage.action == "layout":
                allowed = runs & (rows.visual >= 0)
            elif stage.action == "delete":
                rows = rows.take(active)
                allowed, active = rows.visual >= 0, torch.arange(len(rows))
        positions = rows.position[:, active]
        if decides and schedule.position_mode == "renumber":
            positions, next_position = torch.arange(len(active)).expand_as(positions), len(active)
            rows = replace(rows, position=positions) if stage.action == "delete" else rows
        for layer in range(stage.lo, stage.hi):
            before = replace(rows.take(active), position=positions)
            if bypass is not None:
                before = bypass.joined(before)
            output, entry = layer_fn(layer, before)
            ran = output if bypass is None else bypass.without_proxies(output)
            hidden = rows.hidden.clone()
            hidden[active] = ran
            rows = replace(rows, hidden=hidden)
            rows = rows.added(layer, active if schedule.deepstack == "running" else torch.arange(len(rows)))
            walk.ran.append(before.origin.numpy())
            walk.hidden.append(output)
            walk.cache.append(entry)
            walk.next_position.append(next_position)
    return rows, walk


def cut(walk: Walk, which: str) -> None:
    """Leave of earlier layers' caches the rows that the last layer ran (15.1)."""
    if which == "no" or not walk.decisions:
        return
    for layer in range(int(which == "all_but_first"), len(walk.ran)):
        stays = torch.from_numpy(np.isin(walk.ran[layer], walk.ran[-1]))
        walk.cache[layer] = tuple(array[:, stays] for array in walk.cache[layer])
        walk.ran[layer] = walk.ran[layer][stays.numpy()]


def keep_count(stage: Stage, visual: int) -> int:
    """Tokens that a decision keeps of a row with `visual` tokens at the decoder input (2.2)."""
    return stage.count if stage.count is not None else max(1, int(visual * stage.ratio))


def select(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores, ascending; of equal scores the lowest index wins (2.3)."""
    best = torch.argsort(scores, descending=True, stable=True)[:count]
    return best.sort().values


def choose(scores: Tensor, held: Tensor, count: int, union: bool) -> Tensor:
    """Indices, ascending: rows that are `held` and the best others, `count` in all; with `union` the best `count` and
    those that are held (14.3)."""
    if union:
        chosen = held.clone()
        chosen[select(scores, count)] = True
        return chosen.nonzero()[:, 0]
    return select(scores.masked_fill(held, torch.inf), count)


def _decision(stage: Stage, rows: RaggedRows, scores: Tensor, chosen: Tensor, original: int) -> EagerDecision:
    """Rewrite row indices as original visual indices; rows that are gone are no candidates either."""
    by_index, visual = np.full(original, -np.inf, np.float32), rows.visual >= 0
    by_index[rows.visual[visual].numpy()] = scores[visual].numpy()
    return EagerDecision(stage.lo, by_index, rows.visual[chosen].numpy())


def penalised(logits: Tensor, seen: set[int], penalty: float) -> Tensor:
    """Repetition penalty as transformers applies it, once for every distinct id seen so far."""
    index = torch.tensor(sorted(seen))
    picked = logits[index]
    return logits.index_put((index,), torch.where(picked < 0, picked * penalty, picked / penalty))


# --- The prompt -------------------------------------------------------------------------------------------------------


def _image_runs(is_image: Tensor, counts: Sequence[int]) -> Sequence[Tensor]:
    """Indices of each image's tokens in the prompt."""
    places = is_image.nonzero()[:, 0]
    runs = places.split(list(counts)) if counts and len(places) == sum(counts) else ()
    if len(places) != sum(counts) or any((run.diff() != 1).any() for run in runs):
        raise ValueError(f"expected runs of {counts} image tokens in the prompt, found {len(places)} image tokens")
    return runs


def _decoder_input(
    model: PreTrainedModel,
    ids: Tensor,
    positions: Tensor,
    images: Sequence[ImageTensors],
    runs: Sequence[Tensor],
    first_image_only: bool,
) -> RaggedRows:
    """Rows at the decoder input, at their positions in the unpruned prompt (4.5, 5.5)."""
    hidden, visual = model.model.language_model.embed_tokens(ids), torch.full((len(ids),), -1)
    kept, width = ids != model.config.image_token_id, hidden.shape[1]
    wide = max((image.features.shape[1] for image in images), default=width)
    deepstack = hidden.new_zeros(len(ids), wide - width) if wide > width else None
    for number, (image, run, first) in enumerate(zip(images, runs, _firsts(images), strict=True)):
        left = run[image.index] if image.placed else run[: len(image.index)]
        kept[left] = True
        hidden[left] = image.features[:, :width].to(hidden.dtype)
        if deepstack is not None:
            deepstack[left] = image.features[:, width:].to(hidden.dtype)
        if number == 0 or not first_image_only:
            visual[left] = first + image.index
    rows = RaggedRows(hidden, positions, torch.arange(len(ids)), visual, deepstack)
    return rows.take(kept.nonzero()[:, 0])


def _positions_of_smaller(
    model: PreTrainedModel,
    ids: Tensor,
    positions: Tensor,
    images: Sequence[ImageTensors],
    runs: Sequence[Tensor],
    merge: Downsample,
) -> tuple[Tensor, int]:
    """The rows that are left where an ordinary prompt with the smaller images has them (16.4), and the next token's."""
    side = model.model.visual.spatial_merge_size
    cells = [image.grid if merge.blur else smaller_grid(merge, image.grid) for image in images]
    shorter, left = ids != model.config.image_token_id, ids != model.config.image_token_id
    for image, run in zip(images, runs, strict=True):
        shorter[run[: len(image.index)]] = True
        left[run[image.index]] = True
    thw = np.array([(1, rows * side, cols * side) for rows, cols in cells])
    found, next_position = _family_of(model).positions(model, ids[shorter], thw)
    moved = positions.clone()
    moved[:, left] = found
    return moved, next_position


def _visual_index(images: Sequence[ImageTensors]) -> Tensor:
    """Original visual index, over all images of the prompt, of each token that is left."""
    return torch.cat([first + image.index for image, first in zip(images, _firsts(images), strict=True)])


def _members(images: Sequence[ImageTensors]) -> list[np.ndarray]:
    """Original visual indices, over all images of the prompt, of what each token that is left was made of."""
    given = zip(images, _firsts(images), strict=True)
    return [first + own.nonzero()[:, 0].numpy() for image, first in given for own in image.members]


def _firsts(images: Sequence[ImageTensors]) -> list[int]:
    """Of each image, how many visual tokens stand before it."""
    return [sum(image.count for image in images[:number]) for number in range(len(images))]
