"""Shapes in signatures are checked at run time, and matrix products are not rounded to a faster format."""

import jax
from jaxtyping import install_import_hook

install_import_hook("reroute_jax", "beartype.beartype")
jax.config.update("jax_default_matmul_precision", "highest")
