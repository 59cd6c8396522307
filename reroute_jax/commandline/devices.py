"""The argument that splits a model over devices."""

from __future__ import annotations

from reroute_jax.commandline.parsing import RUN, Parser, argument_of
from reroute_jax.mesh import mesh_sizes


def add_mesh_argument(parser: Parser) -> None:
    """--mesh, as `load` takes it; None unless given."""
    parser.group(RUN).add_argument(
        "--mesh",
        type=_mesh,
        metavar="data=N,model=M",
        help="split questions over N and heads, MLP and vocabulary over M devices (default: one device)",
    )


@argument_of
def _mesh(text: str) -> str:
    """In its long form."""
    return ",".join(f"{axis}={size}" for axis, size in mesh_sizes(text).items())
