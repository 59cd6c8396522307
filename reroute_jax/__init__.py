"""Visual-token routing for vision-language models: FastV, PDrop, Nuwa, and Reroute, in JAX."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reroute_jax.errors import RerouteError
from reroute_jax.routing.plan import Schedule

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from reroute_jax.engine.answers import Answer
    from reroute_jax.engine.model import Model
    from reroute_jax.functional import abstract_params, apply, init

__all__ = ["Answer", "Model", "RerouteError", "Schedule", "abstract_params", "apply", "init", "load"]

# Named here, imported where they are first asked for: the command line need not wait for all of JAX.
_ROOMS = {
    "Answer": "reroute_jax.engine.answers",
    "Model": "reroute_jax.engine.model",
    **dict.fromkeys(("abstract_params", "apply", "init"), "reroute_jax.functional"),
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ROOMS[name]), name)


def load(
    path: str | Path,
    dtype: str | None = None,
    mrope_compat: str | None = None,
    vicuna_system: bool = False,
    pixel_limits: tuple[int, int] | None = None,
    mesh: str | Mesh | None = None,
    quantise: str | None = None,
    kv_cache: str | None = None,
) -> Model:
    """Load a hub id, a Hugging Face folder (converted on the fly), a converted folder or an embedded model; see
    `convert.loading.load`."""
    # Imported here: `convert` needs this package's configuration, and loading needs `convert`.
    from convert.loading import load as load_model

    return load_model(path, dtype, mrope_compat, vicuna_system, pixel_limits, mesh, quantise, kv_cache)
