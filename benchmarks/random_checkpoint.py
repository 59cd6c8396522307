"""`python -m benchmarks.random_checkpoint llava-1.5-7b OUT --shards 3 --dtype bfloat16`

A checkpoint of a named shape with random weights, in the Hugging Face form and the hub's key spelling, with a
byte-level tokenizer and an image processor: it converts, loads and can be prompted like the real one. Streamed: one
tensor is in memory at a time.
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from convert.conversion import check_free
from convert.families import abstract_params, table_of
from convert.safetensors import write_folder
from convert.table import hf_shapes
from evals.speed.checkpoint_shapes import SHAPES, Shape
from reroute_jax.commandline.parsing import OUTPUT, RUN, Parser, exit_code, positive, whole
from reroute_jax.models import read_config
from reroute_jax.types import FLOATS

# As in the initialisation of LLaMA, Qwen and CLIP.
WEIGHT_STD = 0.02


def write(shape: Shape, out: Path, shards: int = 1, dtype: str = "bfloat16", seed: int = 0) -> None:
    """Write the checkpoint folder `out`, the same for the same arguments. Raises RerouteError if `out` exists."""
    check_free(out)
    config = shape.config(dtype)
    model = read_config(config)
    target = {path: value.shape for path, value in abstract_params(model).items()}
    shapes = hf_shapes(table_of(model), target)
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shape.save_companions(out)
    kind = FLOATS[dtype]
    total = sum(math.prod(size) for size in shapes.values()) * kind.itemsize
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing") as bar:

        def produce(key: str) -> np.ndarray:
            bar.update(math.prod(shapes[key]) * kind.itemsize)
            return _random(key, shapes[key], seed).astype(kind)

        write_folder(out, shapes, kind, produce, shards)


def _random(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Each tensor has its own stream, so that the sharding does not change the values."""
    values = np.random.default_rng((seed, zlib.crc32(key.encode()))).standard_normal(shape, np.float32)
    values *= WEIGHT_STD
    if ("norm" in key or "ln_q" in key) and key.endswith(".weight"):
        values += 1
    return values


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parser().parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    shape = SHAPES[args.shape]
    if args.layers is not None:
        shape = replace(shape, decoder=replace(shape.decoder, layers=args.layers))
    return exit_code(lambda: write(shape, args.out, args.shards, args.dtype, args.seed), args.debug)


def _parser() -> Parser:
    examples = (
        "llava-1.5-7b random-7b --shards 3 --dtype bfloat16",
        "qwen-tiny random-qwen --dtype float32",
        "llava-1.5-7b random-shallow --layers 4",
    )
    parser = Parser("benchmarks.random_checkpoint", __doc__, examples)
    run, output = parser.group(RUN), parser.group(OUTPUT)
    run.add_argument("shape", metavar="SHAPE", choices=list(SHAPES), help=f"one of {', '.join(SHAPES)}")
    run.add_argument("--layers", type=positive, help="of the decoder (default: the shape's)")
    run.add_argument("--dtype", choices=list(FLOATS), default="bfloat16", help="(default: %(default)s)")
    run.add_argument("--seed", type=whole, default=0, help="of the weights (default: %(default)s)")
    output.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist")
    output.add_argument("--shards", type=positive, default=1, help="safetensors files (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
