"""`python -m benchmarks.vision_windows --grid 24 24 --repeats 5`

What window attention of Qwen2.5-VL's tower costs against the same attention written as one masked map over the whole
image: FLOPs by XLA's cost analysis, and time. One attention sublayer and one whole layer of the released shape.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from reroute_jax.commandline.parsing import DATA, RUN, Parser, exit_code, positive
from reroute_jax.nn.attention import attention
from reroute_jax.vision.qwen2_5 import VisionLayer, image_attention, window_attention
from reroute_jax.vision.qwen_config import QwenVisionConfig
from reroute_jax.vision.qwen_layers import rotary
from reroute_jax.vision.qwen_windows import QwenPixels, pack

# Qwen2.5-VL-3B, -7B and -72B have this tower (the MLP of -72B is 3456 wide).
CONFIG = QwenVisionConfig(
    hidden_size=1280,
    mlp_dim=3420,
    num_layers=1,
    num_heads=16,
    patch_size=14,
    temporal_patch_size=2,
    merge=2,
    window=8,
    full_attention=(),
)


def masked_attention(q, k, v, pixels: QwenPixels):
    """What windows compute, on the map of the whole image: patches see those of the same window."""
    window = pixels.slot // pixels.windows.shape[2]
    return attention(q, k, v, window[:, :, None] == window[:, None])


def measure(function: Callable, arguments: tuple, repeats: int) -> tuple[float, float]:
    """(GFLOPs, best seconds of `repeats` runs after a first one)."""
    compiled = jax.jit(function).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - start)
    return compiled.cost_analysis()["flops"] / 1e9, min(times)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = _parser().parse_args(argv)
    return exit_code(lambda: compare(options), options.debug)


def _parser() -> Parser:
    examples = ("--grid 24 24 --repeats 5", "--grid 12 40", "--repeats 20")
    parser = Parser("benchmarks.vision_windows", __doc__, examples)
    parser.group(RUN).add_argument("--repeats", type=positive, default=5, help="runs of each (default: %(default)s)")
    parser.group(DATA).add_argument(
        "--grid",
        type=positive,
        nargs=2,
        default=(24, 24),
        metavar=("ROWS", "COLS"),
        help="visual tokens (default: 24 24)",
    )
    return parser


def compare(options: argparse.Namespace) -> None:
    rows, cols = options.grid
    values = np.zeros((CONFIG.merge**2 * rows * cols, CONFIG.patch_values), np.float32)
    pixels = jax.tree.map(jnp.asarray, pack(values, [(rows, cols)], CONFIG, images=1))
    patches, head = pixels.patches.shape[1], CONFIG.hidden_size // CONFIG.num_heads
    draws = iter(jax.random.split(jax.random.key(0), 4))
    qkv = tuple(jax.random.normal(next(draws), (1, CONFIG.num_heads, patches, head)) for _ in range(3))
    x = jax.random.normal(next(draws), (1, patches, CONFIG.hidden_size))
    layers = [VisionLayer(CONFIG, windowed, rngs=nnx.Rngs(0), dtype=jnp.float32) for windowed in (True, False)]
    rope = rotary(pixels.place, head)
    cases = {
        "attention, windows": (window_attention, (*qkv, pixels)),
        "attention, one masked map": (masked_attention, (*qkv, pixels)),
        "attention, whole image": (image_attention, (*qkv, pixels)),
        "layer, windows": (VisionLayer.__call__, (layers[0], x, rope, pixels)),
        "layer, whole image": (VisionLayer.__call__, (layers[1], x, rope, pixels)),
    }
    real = slice(0, int(pixels.count[0]))
    off = jnp.abs(window_attention(*qkv, pixels) - masked_attention(*qkv, pixels))[:, :, real].max()
    print(f"{rows} x {cols} tokens, {patches} patches, {pixels.windows.shape[1]} windows; windows - mask: {off:.1e}")
    print(f"{'':<28}{'GFLOPs':>9}{'ms':>9}")
    for name, (function, arguments) in cases.items():
        flops, seconds = measure(function, arguments, options.repeats)
        print(f"{name:<28}{flops:>9.1f}{seconds * 1e3:>9.0f}")


if __name__ == "__main__":
    sys.exit(main())
