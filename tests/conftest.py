"""Shapes in signatures are checked at run time."""

from jaxtyping import install_import_hook

install_import_hook("reroute_jax", "beartype.beartype")
