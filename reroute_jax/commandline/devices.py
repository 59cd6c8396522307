"""The argument that splits a model over devices."""

from __future__ import annotations

import argparse

from reroute_jax.commandline.parsing import RUN, Parser
from reroute_jax.errors import RerouteError
from reroute_jax.mesh import mesh_sizes


def add_mesh_argument(parser: Parser) -> None:
    """--mesh, as `load` takes it; None unless given."""
    parser.group(RUN).add_argument(
        "--mesh",
        type=_mesh,
        metavar="data=N,model=M",
        help="split questions over N and heads, MLP and vocabulary over M devices (default: one device)",
    )


def _mesh(text: str) -> str:
    """In its long form."""
    try:
        return ",".join(f"{axis}={size}" for axis, size in mesh_sizes(text).items())
    except RerouteError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
