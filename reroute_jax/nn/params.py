"""Parameters of a module as a flat mapping `decoder.layers.0.attn.q.kernel -> array`, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from reroute_jax.errors import RerouteError


def named_parameters(module: nnx.Module) -> dict[str, Any]:
    """Every parameter by its dotted path (abstract values for a module from `nnx.eval_shape`); a quantised one is a
    `qwix.QArray` of them."""
    return {_dotted(path): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(module))}


def mapped(module: nnx.Module, function: Callable[[tuple, nnx.Variable], nnx.Variable]) -> nnx.Module:
    """A module of the same structure with what `function` makes of each parameter and its path."""
    graph, state = nnx.split(module)
    made = [(path, function(path, leaf)) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(made))


def with_parameters(module: nnx.Module, values: Mapping[str, Any]) -> nnx.Module:
    """A module of the same structure holding `values`. Raises RerouteError unless the names are the same."""
    names = set(named_parameters(module))
    if names != set(values):
        odd = sorted(names ^ set(values))
        raise RerouteError(f"parameters do not fit the model: {len(odd)} missing or surplus, first {odd[0]!r}")
    return mapped(module, lambda path, leaf: leaf.replace(values[_dotted(path)]))


def _dotted(path: tuple) -> str:
    return ".".join(str(part) for part in path)
