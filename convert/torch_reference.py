"""Routed LLaVA in PyTorch, the slow and obvious way: one sample, eager, ragged. The yardstick of the JAX code.

Written from sections 2, 3, 4 and 6 of the method specification and from nothing else: deletion really removes rows,
reroute really leaves deferred rows out of every layer, and each layer's cache holds just the rows that ran. Layers are
built of the transformers model's own norms, projections, MLPs and rotary tables; the loop, the attention and the
routing are this file's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from convert.torch_nuwa import merge_image, project_image
from reroute_jax.routing.plan import NuwaMerge, Schedule, Stage


@dataclass(frozen=True)
class Rows:
    """Tokens in sequence order. hidden [T, D]; the rest int64 [T].

    position: rotary position; origin: index in the unpruned prompt; visual: original visual index, -1 for text.
    """

    hidden: Tensor
    position: Tensor
    origin: Tensor
    visual: Tensor

    def __len__(self) -> int:
        return len(self.hidden)

    def take(self, index: Tensor) -> Rows:
        return Rows(self.hidden[index], self.position[index], self.origin[index], self.visual[index])


@dataclass(frozen=True)
class Decision:
    """scores: fp32 [n] by original visual index, -inf where not a candidate; selected: original indices, ascending."""

    layer: int
    scores: np.ndarray
    selected: np.ndarray


@dataclass
class Walk:
    """What a prefill did. By layer: the rows it ran on, their outputs, its cache entry, decode's first position."""

    decisions: list[Decision] = field(default_factory=list)
    ran: list[np.ndarray] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    cache: list = field(default_factory=list)
    next_position: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """Everything comparable about one run. Arrays are numpy, real ones fp32.

    features: [n, D] projected image features as the decoder gets them, None without an image.
    anchors: original patch index of each of them after a Nuwa merge, else None.
    ran: per layer the rows cached in prefill, as indices into the unpruned prompt. hidden: their outputs.
    logits: [vocab] at the last prompt token; tokens: greedy continuation, the stop token included.
    """

    features: np.ndarray | None
    anchors: np.ndarray | None
    decisions: list[Decision]
    ran: list[np.ndarray]
    hidden: list[np.ndarray]
    logits: np.ndarray
    tokens: list[int]


@torch.no_grad()
def run(
    model: LlavaForConditionalGeneration,
    input_ids: np.ndarray,
    pixel_values: np.ndarray | None = None,
    schedule: Schedule | None = None,
    *,
    prior: np.ndarray | None = None,
    max_new_tokens: int = 0,
    eos_tokens: Sequence[int] = (),
    repetition_penalty: float = 1.0,
) -> Reference:
    """Prefill one unpadded prompt `input_ids [S]` under a schedule, then decode greedily.

    pixel_values: `[3, H, W]` or `[1, 3, H, W]` of its one image, or None; without an image nothing is routed (9.4).
    prior: fp32 [decisions, n] by original visual index, for stages with score="prior".
    Raises ValueError if the image tokens of the prompt are not one run as long as the image's features.
    """
    ids = torch.as_tensor(np.asarray(input_ids)).long()
    schedule = schedule or Schedule((Stage(0, len(model.model.language_model.layers)),), recover=False)
    image = None if pixel_values is None else _image(model, pixel_values, schedule)
    rows = _decoder_input(model, ids, image)

    def score(stage: Stage, number: int, rows: Rows, before: Rows | None) -> Tensor:
        if stage.score == "prior":
            return torch.from_numpy(np.asarray(prior))[number][rows.visual.clamp(min=0)]
        if stage.score == "previous_layer":
            return last_token_score(model, stage.lo - 1, before)
        return last_token_score(model, stage.lo, rows)

    visual = int((ids == model.config.image_token_index).sum())
    rows, walk = route(rows, schedule, lambda layer, rows: run_layer(model, layer, rows), score, visual, len(ids))
    logits = _head(model, rows.hidden[-1])
    return Reference(
        features=None if image is None else image.features.float().numpy(),
        anchors=image.index.numpy() if image and isinstance(schedule.merge, NuwaMerge) else None,
        decisions=walk.decisions,
        ran=walk.ran,
        hidden=[hidden.float().numpy() for hidden in walk.hidden],
        logits=logits.numpy(),
        tokens=_decode(model, ids, logits, walk, max_new_tokens, eos_tokens, repetition_penalty),
    )


# --- Routing (sections 2, 3, 6) ---------------------------------------------------------------------------------------


def route(
    rows: Rows,
    schedule: Schedule,
    layer_fn: Callable[[int, Rows], tuple[Tensor, object]],
    score_fn: Callable[[Stage, int, Rows, Rows | None], Tensor],
    original: int,
    next_position: int,
) -> tuple[Rows, Walk]:
    """Walk the layers; returns the rows that are left (for reroute all of them) and the record.

    `layer_fn(layer, rows)` gives outputs and a cache entry; `score_fn(stage, number, rows, before)` a score for every
    row, `before` being what the previous layer was given. original: visual tokens before any merge.
    next_position: of the first generated token, until renumbering changes it.
    """
    allowed, active, before = rows.visual >= 0, torch.arange(len(rows)), None
    count, walk = int(allowed.sum()), Walk()
    for stage in schedule.stages:
        decides = stage.decides and count > 0
        if decides:
            scores = score_fn(stage, len(walk.decisions), rows, before).float().masked_fill(~allowed, -torch.inf)
            chosen = select(scores, min(keep_count(stage, count), int(allowed.sum())))
            walk.decisions.append(_decision(stage, rows, scores, chosen, original))
            runs = rows.visual < 0
            runs[chosen] = True
            active = runs.nonzero()[:, 0]
            if schedule.recover and schedule.monotonic:
                allowed = runs & (rows.visual >= 0)
            elif not schedule.recover:
                rows = rows.take(active)
                allowed, active = rows.visual >= 0, torch.arange(len(rows))
        positions = rows.position[active]
        if decides and schedule.position_mode == "renumber":
            positions, next_position = torch.arange(len(active)), len(active)
            rows = rows if schedule.recover else replace(rows, position=positions)
        for layer in range(stage.lo, stage.hi):
            before = replace(rows.take(active), position=positions)
            output, entry = layer_fn(layer, before)
            hidden = rows.hidden.clone()
            hidden[active] = output
            rows = replace(rows, hidden=hidden)
            walk.ran.append(before.origin.numpy())
            walk.hidden.append(output)
            walk.cache.append(entry)
            walk.next_position.append(next_position)
    return rows, walk


def keep_count(stage: Stage, visual: int) -> int:
    """Tokens that a decision keeps of a row with `visual` tokens at the decoder input (2.2)."""
    return stage.count if stage.count is not None else max(1, int(visual * stage.ratio))


def select(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores, ascending; of equal scores the lowest index wins (2.3)."""
    best = torch.argsort(scores, descending=True, stable=True)[:count]
    return best.sort().values


def head_mean(logits: Tensor) -> Tensor:
    """[T] fp32: softmax of `[N, T]` over all keys, then the plain mean over heads (2.1)."""
    return torch.softmax(logits.float(), dim=-1).mean(dim=0)


def _decision(stage: Stage, rows: Rows, scores: Tensor, chosen: Tensor, original: int) -> Decision:
    """Rewrite row indices as original visual indices; rows that are gone are no candidates either."""
    by_index, visual = np.full(original, -np.inf, np.float32), rows.visual >= 0
    by_index[rows.visual[visual].numpy()] = scores[visual].numpy()
    return Decision(stage.lo, by_index, rows.visual[chosen].numpy())


# --- The decoder (transformers' modules, own loop) --------------------------------------------------------------------


def last_token_score(model: LlavaForConditionalGeneration, layer: int, rows: Rows) -> Tensor:
    """[T] fp32: attention of the last row to every row, by layer `layer`'s own norm and projections (2.1)."""
    q, k, _ = _project(model, layer, rows)
    scale = q.shape[-1] ** -0.5
    return head_mean((k.float() @ q[:, -1, :, None].float())[..., 0] * scale)


def run_layer(model: LlavaForConditionalGeneration, layer: int, rows: Rows) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Outputs [T, D] of one layer, causal in sequence order, and its keys and values [N, T, H]."""
    q, k, v = _project(model, layer, rows)
    later = torch.ones(len(rows), len(rows), dtype=torch.bool).triu(1)
    return _finish_layer(model, layer, rows.hidden, attend(q, k, v, later)), (k, v)


def attend(q: Tensor, k: Tensor, v: Tensor, unseen: Tensor | None = None) -> Tensor:
    """Explicit attention `[T, N * H]` of `q [N, T, H]` to `k, v [N, S, H]`; `unseen [T, S]` marks what to leave out."""
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if unseen is not None:
        logits = logits.masked_fill(unseen, -torch.inf)
    weights = torch.softmax(logits.float(), dim=-1).to(v.dtype)
    return (weights @ v).transpose(0, 1).flatten(1)


def _project(model: LlavaForConditionalGeneration, layer: int, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated q, rotated k and v, each [N, T, H]; key and value heads repeated to the query heads."""
    decoder = model.model.language_model
    attention, x = decoder.layers[layer].self_attn, decoder.layers[layer].input_layernorm(rows.hidden)
    heads = [
        projection(x).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    ]
    cos, sin = (table[0] for table in decoder.rotary_emb(x, rows.position[None]))
    q, k, v = _rotate(heads[0], cos, sin), _rotate(heads[1], cos, sin), heads[2]
    repeats = len(q) // len(k)
    return q, k.repeat_interleave(repeats, dim=0), v.repeat_interleave(repeats, dim=0)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _finish_layer(model: LlavaForConditionalGeneration, layer: int, x: Tensor, attended: Tensor) -> Tensor:
    module = model.model.language_model.layers[layer]
    x = x + module.self_attn.o_proj(attended)
    return x + module.mlp(module.post_attention_layernorm(x))


def _head(model: LlavaForConditionalGeneration, hidden: Tensor) -> Tensor:
    return model.lm_head(model.model.language_model.norm(hidden)).float()


def _decode(
    model: LlavaForConditionalGeneration,
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
            q, *new = _project(model, layer, Rows(x, position, position, position))
            keys, values = cache[layer] = tuple(torch.cat(pair, dim=1) for pair in zip(cache[layer], new, strict=True))
            x = _finish_layer(model, layer, x, attend(q, keys, values))
        logits = _head(model, x[0])
    return tokens


def penalised(logits: Tensor, seen: set[int], penalty: float) -> Tensor:
    """Repetition penalty as transformers applies it, once for every distinct id seen so far."""
    index = torch.tensor(sorted(seen))
    picked = logits[index]
    return logits.index_put((index,), torch.where(picked < 0, picked * penalty, picked / penalty))


# --- The prompt -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Image:
    """features [n, D] as the decoder gets them, and the original patch index [n] that gives each its position."""

    features: Tensor
    index: Tensor


def _image(model: LlavaForConditionalGeneration, pixel_values: np.ndarray, schedule: Schedule) -> Image:
    pixels = torch.as_tensor(np.asarray(pixel_values)).to(model.dtype).reshape(1, 3, *np.shape(pixel_values)[-2:])
    if schedule.merge is not None:
        return Image(*merge_image(model, pixels, schedule.merge))
    features = project_image(model, pixels)
    return Image(features, torch.arange(len(features)))


def _decoder_input(model: LlavaForConditionalGeneration, ids: Tensor, image: Image | None) -> Rows:
    """Rows at the decoder input, at their positions in the unpruned prompt (4.5)."""
    origin, visual = torch.arange(len(ids)), torch.full((len(ids),), -1)
    is_image = ids == model.config.image_token_index
    start, count = int(is_image.int().argmax()), int(is_image.sum())
    vision = model.config.vision_config
    expected = 0 if image is None else (vision.image_size // vision.patch_size) ** 2
    if count != expected or not is_image[start : start + count].all():
        raise ValueError(f"expected one run of {expected} image tokens in the prompt, found {count} image tokens")
    rows = Rows(model.model.language_model.embed_tokens(ids), origin, origin, visual)
    if image is None:
        return rows
    rows = rows.take(torch.cat((origin[:start], start + image.index, origin[start + count :])))
    end = start + len(image.index)
    rows.hidden[start:end] = image.features.to(rows.hidden.dtype)
    rows.visual[start:end] = image.index
    return rows
