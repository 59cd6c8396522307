"""`python -m benchmarks.random_checkpoint llava-1.5-7b OUT --shards 3 --dtype bfloat16`

A checkpoint of a named shape with random weights, in the Hugging Face form and the hub's key spelling, with a
byte-level tokenizer and an image processor: it converts, loads and can be prompted like the real one. Streamed: one
tensor is in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from convert.checkpoint import check_free
from convert.families import abstract_params, table_of
from convert.safetensors import write_folder
from convert.table import hf_shapes
from evals.speed.checkpoint_shapes import SHAPES, LlavaShape, QwenShape
from reroute_jax.errors import RerouteError
from reroute_jax.models import read_config
from reroute_jax.types import FLOATS

# As in the initialisation of LLaMA, Qwen and CLIP.
WEIGHT_STD = 0.02


def write(shape: LlavaShape | QwenShape, out: Path, shards: int = 1, dtype: str = "bfloat16", seed: int = 0) -> None:
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.random_checkpoint", description=__doc__)
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist")
    parser.add_argument("--shards", type=int, default=1, help="safetensors files (default: 1)")
    parser.add_argument("--dtype", choices=list(FLOATS), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    try:
        if args.shards < 1:
            raise RerouteError(f"--shards {args.shards}: expected at least 1")
        write(SHAPES[args.shape], args.out, args.shards, args.dtype, args.seed)
    except RerouteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
