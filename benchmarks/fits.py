"""`python -m benchmarks.fits --random llava-1.5-7b qwen2.5-vl-72b --chips v5e v6e v5p`

How many requests a device can decode at once: what weights leave of its memory, and what a row's KV cache takes of it,
with all visual tokens and routed. From shapes alone, in seconds; nothing is compiled or allocated.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from pathlib import Path

import jax
from jax.sharding import AbstractMesh

import reroute_jax
from benchmarks.lines import line
from convert.loading import with_kv_cache
from evals.speed.checkpoint_shapes import SHAPES
from reroute_jax.commandline.parsing import DATA, OUTPUT, ROUTE, RUN, Parser, budget, exit_code, positive
from reroute_jax.config import DecoderConfig, ModelConfig
from reroute_jax.errors import RerouteError
from reroute_jax.mesh import check_split
from reroute_jax.models import read_config
from reroute_jax.nn.attention import LONG
from reroute_jax.nn.cache import ROOM, token_bytes
from reroute_jax.nn.quantised import with_quantised
from reroute_jax.nn.sharding import AXES, on_mesh
from reroute_jax.routing import methods
from reroute_jax.routing.cost import visual_per_layer
from reroute_jax.vision.clip import ClipConfig

DTYPE = "bfloat16"
# Memory of a chip in GB, from Google's pages of Cloud TPU (November 2026).
CHIPS = {"v5e": 16, "v6e": 32, "v5p": 95}
# The rest is the runtime's, and the compiler's own: 0.33 GB of temporaries for LLaVA-1.5-7B's prefill of one row on a
# v5e, of which `prefill_bytes` explains 0.1 (libtpu 0.0.42.1, November 2026).
USABLE = 0.95
# Weights of the decoder and KV cache; everything else is in bf16 either way. As `load` takes it.
HELD = {"bf16": {}, "int8": {"quantise": "int8", "kv_cache": "int8"}}
# Sides of the square grids of visual tokens; LLaVA-1.5 has the first alone.
SIDES = (24, 48, 128)


@dataclass(frozen=True)
class Shapes:
    """devices: that share the heads, the MLP and the vocabulary. held: of HELD. visual, text: tokens of a request."""

    model: str
    devices: int
    held: str
    chip: str
    visual: int
    text: int
    method: str
    budget: str


@dataclass(frozen=True)
class Room:
    """Bytes are a device's. row_bytes: the cache of a request, with room for its first tokens.
    prefill_bytes: beside them, while a request runs its prompt. rows: requests that fit."""

    weight_bytes: int
    row_bytes: int
    prefill_bytes: int
    rows: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 after one line on bad input."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: compare(args, list(sys.argv[1:] if argv is None else argv)), args.debug)


def compare(args: argparse.Namespace, arguments: Sequence[str]) -> None:
    found = dict(rooms(args))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "fits.jsonl").write_text("".join(line(one, of) for one, of in found.items()))
    command = shlex.join(["python", "-m", "benchmarks.fits", *arguments])
    text = f"`{command}`\n\n{table(found)}\n"
    (args.out / "fits.md").write_text(text)
    print(text)


def rooms(args: argparse.Namespace) -> Iterator[tuple[Shapes, Room]]:
    """Of everything that the arguments name and a mesh can split."""
    for model, devices in product(args.random, args.devices):
        config = read_config(SHAPES[model].config(DTYPE))
        try:
            check_split(config.decoder, devices)
        except RerouteError as reason:
            print(f"note: {model} is left out: {reason}", file=sys.stderr)
            continue
        sides = SIDES[:1] if isinstance(config.vision, ClipConfig) else SIDES
        for held in args.held:
            own = held_config(config, held)
            weights = weight_bytes(own, devices, HELD[held].get("quantise"))
            for side, share in product(sides, [None, *args.budgets]):
                asked = args.text, args.method, "all" if share is None else str(share)
                row, prefill = row_bytes(own, side, args, share, devices)
                for chip in args.chips:
                    left = int(USABLE * CHIPS[chip] * 10**9) - weights - prefill
                    room = Room(weights, row, prefill, max(0, left // row))
                    yield Shapes(model, devices, held, chip, side * side, *asked), room


def held_config(config: ModelConfig, held: str) -> ModelConfig:
    kind = HELD[held].get("kv_cache")
    return config if kind is None else with_kv_cache(config, kind)


def weight_bytes(config: ModelConfig, devices: int, quantise: str | None = None) -> int:
    kv = math.gcd(config.decoder.num_kv_heads, devices)
    module = reroute_jax.abstract_params(config, DTYPE)
    if quantise is not None:
        module = with_quantised(module, quantise)
    placed = on_mesh(module, AbstractMesh((1, kv, devices // kv), AXES))
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(placed)
    )


def row_bytes(
    config: ModelConfig, side: int, args: argparse.Namespace, share: int | Fraction | None, devices: int
) -> tuple[int, int]:
    """Of a request's cache, and of its prefill."""
    decoder, visual = config.decoder, side * side
    how = {"method": "none"} if share is None else {"method": args.method, "budget": share, "action": args.action}
    sizes = {"num_layers": decoder.num_layers, "visual": visual, "grid": (side, side), "family": config.family}
    tokens = sum(visual_per_layer(methods.plan(**how, **sizes), visual)) + decoder.num_layers * (args.text + ROOM)
    width = token_bytes(decoder, DTYPE) // math.gcd(decoder.num_kv_heads, devices)
    return tokens * width, prefill_bytes(decoder, visual + args.text, devices)


def prefill_bytes(decoder: DecoderConfig, slots: int, devices: int) -> int:
    """Of one layer on one row: the residual stream, its sum and its norm, gate and up of the MLP, all bf16, and the
    fp32 logits of a block of queries."""
    streams = 2 * slots * (3 * decoder.hidden_size + 2 * decoder.mlp_dim // devices)
    return streams + 4 * decoder.num_heads // devices * min(slots, LONG) * slots


def table(found: dict[Shapes, Room]) -> str:
    """Markdown: requests that fit."""
    shares = list(dict.fromkeys(one.budget for one in found))
    chips = list(dict.fromkeys(one.chip for one in found))
    columns = [f"{chip} {share}" for chip in chips for share in shares]
    lines = ["| model | devices | held | visual | weights GB | row MB, all | " + " | ".join(columns) + " |"]
    lines.append("|---" * (6 + len(columns)) + "|")
    by_size: dict[tuple, dict[tuple, Room]] = {}
    for one, of in found.items():
        by_size.setdefault((one.model, one.devices, one.held, one.visual), {})[one.chip, one.budget] = of
    for (model, devices, held, visual), own in by_size.items():
        first = next(iter(own.values()))
        cells = [model, str(devices), held, f"{visual:,}"]
        cells += [f"{first.weight_bytes / 1e9:.1f}", f"{first.row_bytes / 1e6:,.0f}"]
        cells += [str(own[chip, share].rows) for chip in chips for share in shares]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _parser() -> Parser:
    examples = ("--random qwen2.5-vl-7b --chips v5e --devices 1 4", "--budgets 1/3 1/9 --method fastv")
    parser = Parser("benchmarks.fits", __doc__, examples)
    run, data, route, output = (parser.group(title) for title in (RUN, DATA, ROUTE, OUTPUT))
    models = ["llava-1.5-7b", "llava-1.5-13b", "qwen2.5-vl-7b", "qwen2.5-vl-32b", "qwen2.5-vl-72b"]
    run.add_argument("--random", nargs="+", choices=tuple(SHAPES), default=models, help="(default: %(default)s)")
    run.add_argument("--chips", nargs="+", choices=tuple(CHIPS), default=list(CHIPS), help="(default: all)")
    run.add_argument(
        "--devices", nargs="+", type=positive, default=[1, 4, 8], metavar="N", help="of a mesh model=N (default: 1 4 8)"
    )
    run.add_argument(
        "--held",
        nargs="+",
        choices=tuple(HELD),
        default=list(HELD),
        help="the decoder's weights and the KV cache; int8 needs qwix (default: both)",
    )
    data.add_argument("--text", type=positive, default=64, help="text tokens of a request (default: %(default)s)")
    route.add_argument("--method", choices=("fastv", "pdrop"), default="pdrop", help="(default: %(default)s)")
    route.add_argument("--action", choices=("delete", "reroute"), default="reroute", help="(default: %(default)s)")
    shares = [Fraction(1, 3), Fraction(2, 9), Fraction(1, 9)]
    route.add_argument(
        "--budgets", nargs="+", type=budget, default=shares, metavar="SHARE", help="(default: 1/3 2/9 1/9)"
    )
    output.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
