"""What int8 and int4 weights change, against the same model in its own dtype. `python -m benchmarks.quantised --help`.

Random prompts with random images: bytes of all weights, how far the logits are off, how many tokens each decision
selects alike, and how many rows have the same greedy tokens. Needs qwix.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from evals.speed.checkpoint_shapes import SHAPES
from evals.speed.subjects import QWEN_GRID, Sample, Subject, add_subject_arguments, open_subject, random_model, sample
from reroute_jax.commandline.parsing import DATA, ROUTE, RUN, Parser, exit_code, positive
from reroute_jax.engine.model import Model
from reroute_jax.errors import RerouteError
from reroute_jax.nn.params import named_parameters
from reroute_jax.nn.quantised import TILES
from reroute_jax.routing.plan import Schedule


@dataclass(frozen=True)
class QuantisedSight:
    """logits: [B, vocab], of the last token. selected: per decision [B, k]. tokens: [B, new tokens], greedy."""

    nbytes: int
    logits: np.ndarray
    selected: list[np.ndarray]
    tokens: np.ndarray


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 after one line on bad input."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: print(measured(args)), debug=args.debug)


def measured(args: argparse.Namespace) -> str:
    """A table in Markdown."""
    subject = _subject(args)
    schedule, given = subject.plan("pdrop", budget=args.budget), sample(subject, args.rows)
    plain = seen(subject.model, schedule, given, args.new_tokens)
    lines = [
        "| weights | GB | logits off by | tokens selected alike, by decision | rows with equal greedy tokens |",
        "|---|---|---|---|---|",
        f"| {subject.model.dtype} | {plain.nbytes / 1e9:.3f} | | | |",
    ]
    for kind in TILES:
        found = seen(_subject(args, kind).model, schedule, given, args.new_tokens)
        error = np.linalg.norm(found.logits - plain.logits) / np.linalg.norm(plain.logits)
        alike = " ".join(f"{shared(*pair):.3f}" for pair in zip(plain.selected, found.selected, strict=True))
        rows = (plain.tokens == found.tokens).all(axis=1)
        lines.append(f"| {kind} | {found.nbytes / 1e9:.3f} | {error:.4f} | {alike} | {rows.sum()} of {len(rows)} |")
    return "\n".join(lines)


def seen(model: Model, schedule: Schedule, given: Sample, new_tokens: int) -> QuantisedSight:
    prompts = {"input_ids": given.ids, "pixel_values": given.pixels, "image_grid_thw": given.thw}
    found = model.prefill(**prompts, schedule=schedule, trace=True)
    tokens = model.generate_ids(**prompts, schedule=schedule, max_new_tokens=new_tokens)
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(named_parameters(model.module)))
    return QuantisedSight(nbytes, found.logits, list(found.trace.selected), tokens)


def shared(one: np.ndarray, other: np.ndarray) -> float:
    """The share of the tokens of `one`, [B, k], that stand in the same row of `other`."""
    return float(np.mean([np.isin(*pair).mean() for pair in zip(one, other, strict=True)]))


def _subject(args: argparse.Namespace, quantise: str | None = None) -> Subject:
    if args.layers is None:
        return open_subject(args, quantise=quantise)
    if args.random is None:
        raise RerouteError("--layers is of a --random model: name one, or leave it out")
    shape = SHAPES[args.random]
    shape = replace(shape, decoder=replace(shape.decoder, layers=args.layers))
    model, hf_config = random_model(shape, args.dtype or "float32", quantise=quantise)
    grid = getattr(model.config.vision, "grid", None) or tuple(args.grid or QWEN_GRID)
    return Subject(args.random, model, hf_config, grid, args.text)


def _parser() -> Parser:
    examples = ("--model scenes-llava", "--random llava-tiny", "--random llava-1.5-7b --layers 4 --rows 1 --budget 192")
    parser = Parser("benchmarks.quantised", __doc__, examples)
    add_subject_arguments(parser)
    run, data, route = (parser.group(title) for title in (RUN, DATA, ROUTE))
    run.add_argument("--layers", type=positive, help="of a --random decoder (default: all)")
    run.add_argument("--new-tokens", type=positive, default=16, help="of each row (default: %(default)s)")
    data.add_argument("--rows", type=positive, default=8, help="prompts (default: %(default)s)")
    route.add_argument("--budget", type=positive, default=128, help="of PDrop with reroute (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
