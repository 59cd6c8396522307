"""`python -m convert.crosscheck SRC`: the same inputs through PyTorch and through JAX, compared number by number.

Without --method or --preset the checkpoint runs on all tokens and PyTorch's side is transformers itself. With one, the
routed run is compared too, with an eager PyTorch implementation of the method's rules (`reference.py`).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer

import reroute_jax
from convert.source import Source, open_source
from evals.harness.cli import positive
from evals.harness.prompts import REC_STYLE_OF_FAMILY, rec
from evals.harness.routes import SWITCHES, budget
from evals.scenes.data import refcoco_rows
from reroute_jax.config import ModelConfig
from reroute_jax.decoder import forward
from reroute_jax.engine.batching import Row, make_batch
from reroute_jax.engine.compilation import compiled
from reroute_jax.engine.model import Model
from reroute_jax.errors import RerouteError
from reroute_jax.models import FAMILIES, read_config
from reroute_jax.nn.positions import rope_tables
from reroute_jax.routing.merge import merge_arrays
from reroute_jax.routing.methods import METHODS, plan
from reroute_jax.routing.plan import ACTIONS, NuwaMerge, PoolMerge, Schedule
from reroute_jax.routing.presets import preset
from reroute_jax.types import Grid

if TYPE_CHECKING:
    from convert.crosscheck.plain import Plain
    from convert.crosscheck.reference import Reference

# Of fp32 arithmetic, relative to a row's root mean square where that is above 1.
FEATURES = LAYER = SCORES = 1e-5
LOGITS = 1e-4
TEXT_ONLY = "Name three colours."


@dataclass(frozen=True)
class Line:
    """One compared quantity. `found` is a largest difference, or with `of` a number of unequal entries among `of`."""

    quantity: str
    found: float
    allowed: float = 0
    of: int = 0

    @property
    def passes(self) -> bool:
        return self.found <= self.allowed  # False for nan

    def merge(self, other: Line) -> Line:
        found = self.found + other.found if self.of else float(np.fmax(self.found, other.found))
        if np.isnan(self.found + other.found):
            found = float("nan")
        return Line(self.quantity, found, self.allowed, self.of + other.of)


@dataclass(frozen=True)
class Probe:
    """ids: `[S]`, image tokens expanded. pixels, thw: of its images as the processor gives them, None without any.
    grids: (rows, columns) of their visual tokens."""

    ids: np.ndarray
    pixels: np.ndarray | None
    thw: np.ndarray | None
    grids: tuple[Grid, ...]

    @property
    def given(self) -> dict[str, np.ndarray | None]:
        """As the model's methods take it."""
        return {"input_ids": self.ids[None], "pixel_values": self.pixels, "image_grid_thw": self.thw}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, 1 for a difference beyond tolerance, 2 after one line on bad input."""
    args = _parser().parse_args(argv)
    try:
        lines = crosscheck(args)
    except RerouteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(lines))
    failed = [line.quantity for line in lines if not line.passes]
    print(f"\n{len(failed)} of {len(lines)} quantities differ" if failed else "\nPyTorch and JAX agree")
    return 1 if failed else 0


def crosscheck(args: argparse.Namespace) -> list[Line]:
    """All comparisons, one line a quantity over all prompts. One framework's weights are in memory at a time.

    Raises RerouteError without PyTorch, and for a checkpoint or a method that cannot be used.
    """
    if importlib.util.find_spec("torch") is None:
        raise RerouteError("a cross-check needs PyTorch, which is not installed: pip install -e '.[torch]'")
    source = open_source(args.src)
    if source.manifest is not None:
        raise RerouteError(f"{args.src} is a converted checkpoint: give the Hugging Face one, it is converted here")
    config = read_config(source.config)
    tokenizer, processor = _companions(source, config)
    schedule = _schedule(args, config, FAMILIES[config.family].typical_grid(config, lambda: processor))
    prompts = _prompts(config, tokenizer, processor, args.prompts)
    expected = _in_torch(source, config, prompts, schedule, args.max_new_tokens)
    model = reroute_jax.load(args.src, dtype="float32")
    lines = []
    with jax.default_matmul_precision("highest"):
        for prompt, (plain, routed) in zip(tqdm(prompts, desc="JAX", unit="prompt"), expected, strict=True):
            lines += _compare_plain(model, prompt, plain, args.max_new_tokens)
            if routed is not None:
                lines += _compare_routed(model, prompt, routed, schedule, args.max_new_tokens)
    return merge(lines)


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
    rows = [f"{'':{width}}  {'difference':>16}  {'allowed':>8}"]
    for line in lines:
        found = f"{line.found:.0f} of {line.of}" if line.of else f"{line.found:.1e}"
        allowed = "0" if line.of else f"{line.allowed:.0e}"
        rows.append(f"{line.quantity:{width}}  {found:>16}  {allowed:>8}  {'ok' if line.passes else 'DIFFERENT'}")
    return "\n".join(rows)


# --- Inputs -----------------------------------------------------------------------------------------------------------


def _companions(source: Source, config: ModelConfig):
    """Tokenizer and image processor of the checkpoint."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder)
        return tokenizer, FAMILIES[config.family].image_processor(source.folder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RerouteError(
            f"{source.name} needs a tokenizer and an image processor beside its weights: {reason}"
        ) from None


def _prompts(config: ModelConfig, tokenizer, processor, count: int) -> list[Probe]:
    """`count` rendered scenes with a referring question each, and a prompt without an image."""
    family, style, prompts = FAMILIES[config.family], REC_STYLE_OF_FAMILY[config.family], []
    for row in refcoco_rows("test", count, family=config.family):
        pixels, thw = family.preprocess([row["image"]], processor)
        grids = tuple(family.image_grids(pixels, thw, config))
        ids = family.prompt_ids(rec(row["answer"][0], style), grids, tokenizer, config)
        prompts.append(Probe(ids, pixels, thw, grids))
    return [*prompts, Probe(family.prompt_ids(TEXT_ONLY, (), tokenizer, config), None, None, ())]


def _schedule(args: argparse.Namespace, config: ModelConfig, grid: Grid) -> Schedule | None:
    chosen = {name: value for name in SWITCHES if (value := getattr(args, name)) is not None}
    asked = [name for name in ("budget", "action") if getattr(args, name) is not None] + list(chosen)
    if args.preset is not None:
        if args.method is not None or asked:
            raise RerouteError("--preset fixes the whole schedule, leave out --method and what belongs to it")
        return preset(args.preset, config.num_layers)
    if args.method is None:
        if asked:
            raise RerouteError(f"--{asked[0].replace('_', '-')} belongs to a --method, name one")
        return None
    default = 128 if METHODS[args.method].has_budget and args.keep_ratio is None else None
    return plan(
        args.method,
        num_layers=config.num_layers,
        visual=grid[0] * grid[1],
        grid=grid,
        family=config.family,
        budget=default if args.budget is None else args.budget,
        action=args.action or "reroute",
        **chosen,
    )


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def _in_torch(
    source: Source, config: ModelConfig, prompts: Sequence[Probe], schedule: Schedule | None, max_new: int
) -> list[tuple[Plain, Reference | None]]:
    from convert.crosscheck.plain import open_model, plain_run
    from convert.crosscheck.reference import run

    model, results = open_model(source.folder, config, max_new), []
    for prompt in tqdm(prompts, desc="PyTorch", unit="prompt"):
        routed = None
        if schedule is not None:
            row = Row(prompt.ids, prompt.grids)
            routed = run(
                model,
                prompt.ids,
                prompt.pixels,
                schedule,
                image_grid_thw=prompt.thw,
                prior=make_batch([row], config, schedule).prompt.prior[:, 0],
                max_new_tokens=max_new,
                eos_tokens=config.eos_tokens,
                repetition_penalty=config.repetition_penalty,
            )
        results.append((plain_run(model, prompt.ids, prompt.pixels, prompt.thw), routed))
    return results


# --- JAX, and the differences -----------------------------------------------------------------------------------------


@compiled(static_argnames="merge")
def _encode(module, pixels, arrays, merge):
    return FAMILIES[module.config.family].encode_images(module, pixels, arrays, merge)[0]


@compiled()
def _layer(layer, x, rope, mask):
    return layer.prefill(x, rope, mask)[0]


@compiled()
def _all_logits(decoder, x, rope, mask):
    return decoder.logits(forward(decoder, x, rope, mask))


def _compare_plain(model: Model, prompt: Probe, expected: Plain, max_new: int) -> Iterator[Line]:
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
    for number, (x, after) in enumerate(zip(expected.hidden[:-1], expected.hidden[1:], strict=True)):
        output = _layer(decoder.layers[number], jnp.asarray(x)[None], rope, mask)[0]
        yield difference(f"layer {number} on the same input", output, after, LAYER)
    logits = _all_logits(decoder, jnp.asarray(expected.hidden[0])[None], rope, mask)[0]
    yield difference("logits, all positions", logits, expected.logits, LOGITS)
    result = model.prefill(**prompt.given)
    yield difference("logits, last position", result.logits, expected.logits[-1:], LOGITS)
    yield _tokens("greedy tokens", model, prompt, None, expected.tokens, max_new)


def _compare_routed(
    model: Model, prompt: Probe, expected: Reference, schedule: Schedule, max_new: int
) -> Iterator[Line]:
    prefix = f"{schedule.label}: "
    result = model.prefill(**prompt.given, schedule=schedule, trace=True)
    if prompt.pixels is not None and schedule.merge is not None:
        features = _features(model, prompt, schedule.merge)
        yield difference(prefix + "merged image features", features, expected.features, FEATURES)
    if expected.anchors is not None:
        yield unequal(prefix + "anchors", result.trace.anchors[0], expected.anchors)
    for number, decision in enumerate(expected.decisions):
        where = f"{prefix}layer {decision.layer}: "
        yield unequal(where + "selected", result.trace.selected[number][0], decision.selected)
        # Slots behind the image's tokens pad it to a bucket.
        scores, wanted = result.trace.scores[number][0], np.flatnonzero(np.isfinite(decision.scores))
        yield unequal(where + "candidates", np.flatnonzero(np.isfinite(scores)), wanted)
        yield difference(where + "scores", scores[None, wanted], decision.scores[None, wanted], SCORES)
    lengths = np.array([len(ran) for ran in expected.ran])
    yield Line(prefix + "keys cached per layer", int((result.trace.kv_tokens[0] != lengths).sum()), of=len(lengths))
    yield difference(prefix + "logits, last position", result.logits, expected.logits[None], LOGITS)
    yield _tokens(prefix + "greedy tokens", model, prompt, schedule, np.array(expected.tokens), max_new)


def _features(model: Model, prompt: Probe, merge: NuwaMerge | PoolMerge | None) -> np.ndarray:
    """[n, D] of all images, without the padding behind each."""
    family, sizes = model.family, [rows * cols for rows, cols in prompt.grids]
    arrays = merge_arrays(merge, prompt.grids, len(sizes), family.token_bucket(max(sizes)))
    packed = family.pack(prompt.pixels, prompt.grids, model.config, len(sizes))
    left = sizes if merge is None else arrays.keep
    found = _encode(model.module, packed, arrays, merge)
    return np.concatenate([one[:count] for one, count in zip(found, left, strict=True)])


def difference(quantity: str, found, expected: np.ndarray, allowed: float) -> Line:
    """Largest difference between two `[rows, width]` arrays; a row of large numbers may differ by more."""
    scale = np.sqrt(np.mean(np.square(expected, dtype=np.float64), axis=-1, keepdims=True))
    return Line(quantity, float(np.max(np.abs(np.asarray(found) - expected) / np.maximum(scale, 1))), allowed)


def unequal(quantity: str, found: np.ndarray, expected: np.ndarray) -> Line:
    """Indices in one of two sets only; `found` may be padded with -1."""
    found = found[found >= 0]
    missing, surplus = np.setdiff1d(expected, found), np.setdiff1d(found, expected)
    return Line(quantity, max(len(missing), len(surplus)), of=len(expected))


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m convert.crosscheck", description=__doc__)
    parser.add_argument("src", metavar="SRC", help="hub id (owner/model) or checkpoint folder with safetensors")
    parser.add_argument("--method", choices=tuple(METHODS), help="compare a routed run as well")
    parser.add_argument("--budget", type=budget, help="192, 128, 64 or a share such as 0.15 or 1/9 (default: 128)")
    parser.add_argument("--action", choices=ACTIONS, help="default: reroute")
    for name, how in SWITCHES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=None, **how)
    parser.add_argument("--preset", help="a released configuration by its name, instead of method, action and budget")
    parser.add_argument("--prompts", type=positive, default=2, help="rendered scenes to ask about (default: 2)")
    parser.add_argument("--max-new-tokens", type=positive, default=32, help="length of an answer (default: 32)")
    return parser
