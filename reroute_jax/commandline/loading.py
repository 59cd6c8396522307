"""The arguments that say how a model is held: over which devices, and in how many bits."""

from __future__ import annotations

import argparse

from reroute_jax.commandline.parsing import RUN, Parser, argument_of
from reroute_jax.mesh import mesh_sizes
from reroute_jax.nn.cache import KINDS
from reroute_jax.nn.quantised import TILES

# Of `load`, and of the arguments here.
LOAD_OPTIONS = ("mesh", "quantise", "kv_cache")


def add_mesh_argument(parser: Parser) -> None:
    """--mesh, as `load` takes it; None unless given."""
    parser.group(RUN).add_argument(
        "--mesh",
        type=_mesh,
        metavar="data=N,model=M",
        help="split questions over N and heads, MLP and vocabulary over M devices (default: one device)",
    )


def add_bits_arguments(parser: Parser) -> None:
    """--quantise and --kv-cache, as `load` takes them; None unless given."""
    run = parser.group(RUN)
    run.add_argument(
        "--quantise",
        choices=tuple(TILES),
        help="the decoder's weights in so many bits, all else in --dtype; needs qwix (default: as stored)",
    )
    run.add_argument(
        "--kv-cache", choices=KINDS, help="the keys and values that an answer reads in 8 bits (default: in --dtype)"
    )


def load_options(args: argparse.Namespace) -> dict[str, str]:
    """Those of LOAD_OPTIONS that were given, as `load` takes them and as a run's settings tell them."""
    return {name: value for name in LOAD_OPTIONS if (value := getattr(args, name, None)) is not None}


@argument_of
def _mesh(text: str) -> str:
    """In its long form."""
    return ",".join(f"{axis}={size}" for axis, size in mesh_sizes(text).items())
