"""One prompt through JAX, and its differences from what PyTorch made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from convert.crosscheck.inputs import Probe
from reroute_jax.decoder import forward
from reroute_jax.engine.compilation import compiled
from reroute_jax.engine.model import Model
from reroute_jax.engine.smaller_images import packed
from reroute_jax.models import FAMILIES
from reroute_jax.nn.positions import rope_tables
from reroute_jax.routing.merge import Merge, merge_arrays
from reroute_jax.routing.plan import Schedule

if TYPE_CHECKING:
    from convert.crosscheck.plain import Plain
    from convert.crosscheck.reference import Reference

# Bounds of fp32, whose numbers are apart by 1.2e-7 of their size, times a row's scale where that is above 1. Real
# decoders carry a few channels in the thousands, and a row's rounding is that of its largest numbers: 1e-5 of them is
# some 80 roundings. Scores are shares, below 1: their bound is absolute. A row of logits counts by its root mean
# square, which is near 1.
FEATURES = LAYER = SCORES = 1e-5
LOGITS = 1e-4


def _largest(rows: np.ndarray) -> np.ndarray:
    return np.abs(rows).max(axis=-1)


def _root_mean_square(rows: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(np.square(rows, dtype=np.float64), axis=-1))


@dataclass(frozen=True)
class Line:
    """One compared quantity. With `of`, `found` counts unequal entries among `of`; else it is the largest difference in
    units of its row's `scale`, as `allowed` is."""

    quantity: str
    found: float
    allowed: float = 0
    of: int = 0
    scale: float = 1

    @property
    def passes(self) -> bool:
        return self.found <= self.allowed  # False for nan

    def merge(self, other: Line) -> Line:
        if self.of:
            return Line(self.quantity, self.found + other.found, self.allowed, self.of + other.of)
        return other if np.isnan(other.found) or other.found > self.found else self


def merge(lines: Sequence[Line]) -> list[Line]:
    """Lines of one quantity become one, in order of first appearance."""
    order = list(dict.fromkeys(line.quantity for line in lines))
    merged = []
    for _, group in groupby(sorted(lines, key=lambda line: order.index(line.quantity)), key=lambda line: line.quantity):
        first, *others = group
        for other in others:
            first = first.merge(other)
        merged.append(first)
    return merged


def table(lines: Sequence[Line]) -> str:
    width = max(len(line.quantity) for line in lines)
    rows = [f"{'':{width}}  {'difference':>16}  {'scale':>8}  {'allowed':>8}"]
    for line in lines:
        found = f"{line.found:.0f} of {line.of}" if line.of else f"{line.found * line.scale:.1e}"
        scale = "" if line.of else f"{line.scale:.4g}"
        allowed = "0" if line.of else f"{line.allowed * line.scale:.0e}"
        verdict = "ok" if line.passes else "DIFFERENT"
        rows.append(f"{line.quantity:{width}}  {found:>16}  {scale:>8}  {allowed:>8}  {verdict}")
    return "\n".join(rows)


@compiled(static_argnames="merge")
def _encode(module, pixels, arrays, merge):
    return FAMILIES[module.config.family].encode_images(module, pixels, arrays, merge)[0]


@compiled()
def _layer(layer, x, rope, mask):
    return layer.prefill(x, rope, mask)[0]


@compiled()
def _all_logits(decoder, x, rope, mask, deepstack):
    return decoder.logits(forward(decoder, x, rope, mask, deepstack))


def compare_plain(model: Model, prompt: Probe, expected: Plain, max_new: int) -> Iterator[Line]:
    decoder = model.module.decoder
    if prompt.pixels is not None:
        yield difference("image features", _features(model, prompt, None), expected.features, FEATURES)
    text = prompt.ids != model.config.image_token
    embeds = decoder.embed(jnp.asarray(prompt.ids[text])[None])[0]
    yield difference("text embeddings", embeds, expected.hidden[0][text], 0)
    length = len(prompt.ids)
    positions, _ = model.family.positions(prompt.ids, prompt.grids, model.config)
    rope = rope_tables(jnp.asarray(positions)[..., None, :], decoder.config)
    mask = jnp.tril(jnp.ones((1, length, length), bool))
    deepstack = _deepstack(~text, expected)
    for number, (x, after) in enumerate(zip(expected.hidden[:-1], expected.hidden[1:], strict=True)):
        x = x + deepstack[number - 1] if 0 < number <= len(deepstack) else x
        output = _layer(decoder.layers[number], jnp.asarray(x)[None], rope, mask)[0]
        yield difference(f"layer {number} on the same input", output, after, LAYER)
    added = tuple(jnp.asarray(level)[None] for level in deepstack)
    logits = _all_logits(decoder, jnp.asarray(expected.hidden[0])[None], rope, mask, added)[0]
    yield difference("logits, all positions", logits, expected.logits, LOGITS, _root_mean_square)
    result = model.prefill(**prompt.given)
    yield difference("logits, last position", result.logits, expected.logits[-1:], LOGITS, _root_mean_square)
    yield _tokens("greedy tokens", model, prompt, None, expected.tokens, max_new)


def compare_routed(
    model: Model, prompt: Probe, expected: Reference, schedule: Schedule, max_new: int
) -> Iterator[Line]:
    prefix = f"{schedule.label}: "
    result = model.prefill(**prompt.given, schedule=schedule, trace=True)
    if prompt.pixels is not None and schedule.merge is not None:
        features = _features(model, prompt, schedule.merge)
        yield difference(prefix + "merged image features", features, expected.features, FEATURES)
    if expected.anchors is not None:
        yield unequal(prefix + "anchors", result.trace.anchors[0], expected.anchors)
        found = _made_of(result.trace.anchors[0], result.trace.members[0])
        yield unequal(prefix + "members", found, _made_of(expected.anchors, expected.members))
    for number, decision in enumerate(expected.decisions):
        where = f"{prefix}layer {decision.layer}: "
        yield unequal(where + "selected", result.trace.selected[number][0], decision.selected)
        # Slots behind the image's tokens pad it to a bucket.
        scores, wanted = result.trace.scores[number][0], np.flatnonzero(np.isfinite(decision.scores))
        yield unequal(where + "candidates", np.flatnonzero(np.isfinite(scores)), wanted)
        yield difference(where + "scores", scores[None, wanted], decision.scores[None, wanted], SCORES)
    lengths = np.array([len(ran) for ran in expected.ran])
    yield Line(prefix + "keys cached per layer", int((result.trace.kv_tokens[0] != lengths).sum()), of=len(lengths))
    logits = expected.logits[None]
    yield difference(prefix + "logits, last position", result.logits, logits, LOGITS, _root_mean_square)
    yield _tokens(prefix + "greedy tokens", model, prompt, schedule, np.array(expected.tokens), max_new)


def _deepstack(visual: np.ndarray, expected: Plain) -> list[np.ndarray]:
    """`[S, D]` for each level: what is added to the output of a layer, the features behind the first D at `visual`."""
    levels = []
    if expected.features is not None:
        width = expected.hidden.shape[-1]
        for start in range(width, expected.features.shape[1], width):
            levels.append(np.zeros_like(expected.hidden[0]))
            levels[-1][visual] = expected.features[:, start : start + width]
    return levels


def _features(model: Model, prompt: Probe, merge: Merge | None) -> np.ndarray:
    """[n, D] of all images, without the padding behind each; those of DeepStack's levels behind a token's own."""
    family, sizes = model.family, [rows * cols for rows, cols in prompt.grids]
    arrays = merge_arrays(merge, prompt.grids, len(sizes), family.token_bucket(max(sizes)))
    pixels = packed(merge, prompt.pixels, prompt.grids, model.config, len(sizes))
    left = (
        sizes if merge is None else [merge.anchors(size, grid) for size, grid in zip(sizes, prompt.grids, strict=True)]
    )
    found = _encode(model.module, pixels, arrays, merge)
    return np.concatenate([one[:count] for one, count in zip(found, left, strict=True)])


def difference(
    quantity: str,
    found,
    expected: np.ndarray,
    allowed: float,
    size: Callable[[np.ndarray], np.ndarray] = _largest,
) -> Line:
    """Largest difference between two `[rows, width]` arrays over its row's scale: the `size` of what is expected there,
    1 where it is less."""
    scale = np.maximum(size(expected), 1)
    relative = np.max(np.abs(np.asarray(found) - expected), axis=-1) / scale
    worst = int(np.argmax(relative))  # the first NaN where there is one
    return Line(quantity, float(relative[worst]), allowed, scale=float(scale[worst]))


def unequal(quantity: str, found: np.ndarray, expected: np.ndarray) -> Line:
    """Indices in one of two sets only; `found` may be padded with -1."""
    found = found[found >= 0]
    missing, surplus = np.setdiff1d(expected, found), np.setdiff1d(found, expected)
    return Line(quantity, max(len(missing), len(surplus)), of=len(expected))


def _made_of(anchors: np.ndarray, members: Iterable[np.ndarray]) -> np.ndarray:
    """One number for each pair of an anchor and one of its members, which may be padded with -1."""
    pairs = [
        (anchor << 32) + own[own >= 0].astype(np.int64) for anchor, own in zip(anchors.tolist(), members, strict=True)
    ]
    return np.concatenate(pairs)


def _tokens(
    quantity: str, model: Model, prompt: Probe, schedule: Schedule | None, expected: np.ndarray, max_new: int
) -> Line:
    """`expected` ends with a stop token or after `max_new` tokens."""
    found = model.generate_ids(
        **prompt.given,
        schedule=schedule,
        max_new_tokens=max_new,
        eos_token_id=model.config.eos_tokens,
        repetition_penalty=model.config.repetition_penalty,
    )[0]
    padded = np.pad(expected, (0, max_new - len(expected)), constant_values=model.config.pad_token)
    return Line(quantity, int((found != padded).sum()), of=max_new)
