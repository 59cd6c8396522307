"""Visual-token routing for vision-language models: FastV, PDrop, Nuwa, and Reroute, in JAX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from reroute_jax.errors import RerouteError
from reroute_jax.routing.plan import Schedule

if TYPE_CHECKING:
    from reroute_jax.engine.model import Model

__all__ = ["RerouteError", "Schedule", "load"]


def load(
    path: str | Path,
    dtype: str | None = None,
    mrope_compat: str | None = None,
    vicuna_system: bool = False,
    pixel_limits: tuple[int, int] | None = None,
) -> Model:
    """Load a hub id, a Hugging Face folder (converted on the fly) or a converted folder; see `convert.loading.load`."""
    # Imported here: `convert` needs this package's configuration, and loading needs `convert`.
    from convert.loading import load as load_model

    return load_model(path, dtype, mrope_compat, vicuna_system, pixel_limits)
