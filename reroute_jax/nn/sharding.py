"""Where arrays lie on a mesh of devices: one table from logical axes, which parameters name, to the axes of the mesh.

A mesh has `data` devices for rows times `model` devices for heads, MLP and vocabulary. In JAX's mesh `model` is two
axes, because a decoder may have fewer KV heads than there are devices for heads: these are split over `kv` alone, and
the devices along `group` hold copies of them, each for other queries of the same group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array

from reroute_jax.nn.params import mapped

DATA, KV, GROUP = AXES = "data", "kv", "group"
_MODEL = (KV, GROUP)
# Of a dimension: the longest run of these axes that divides it. What none divides lies on every device.
TABLE: dict[str | None, tuple[str, ...]] = {
    "rows": (DATA,),
    "heads": _MODEL,
    "kv_heads": _MODEL,
    "mlp": _MODEL,
    "vocab": _MODEL,
    "embed": (),
    None: (),
}


def spec(shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Of an array with these logical axes; those behind them are None."""
    return PartitionSpec(*(_split(size, TABLE[axis], mesh) for size, axis in zip(shape, axes, strict=False)))


def _split(size: int, names: tuple[str, ...], mesh: Mesh | AbstractMesh) -> tuple[str, ...] | None:
    while size % math.prod(mesh.shape[name] for name in names):
        names = names[:-1]
    return names or None


def constrain(x: Array, *axes: str | None) -> Array:
    """The array, laid out by its logical axes where a program is traced for a mesh."""
    mesh = _current_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, spec(x.shape, axes, mesh))


def per_device(function: Callable[..., Any], first: Any, *others: Any) -> Any:
    """`function` where a device sees its own part of the arguments alone: of the rows of all of them, `[B, ...]`, and
    of the heads of those with four dimensions, `[B, heads, ...]`. The result is laid out as `first`.
    An argument of several arrays has the shape of one of them, and all are split alike; None is none."""
    mesh = _current_mesh()
    if mesh is None:
        return function(first, *others)

    def place(x: Any) -> PartitionSpec | None:
        return None if x is None else spec(x.shape, ("rows", "heads") if x.ndim == 4 else ("rows",), mesh)

    specs = tuple(map(place, (first, *others)))
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(first, *others)


def on_mesh(module: nnx.Module, mesh: Mesh | AbstractMesh) -> nnx.Module:
    """The parameters as shapes with their places."""

    def placed(_: tuple, leaf: nnx.Variable) -> nnx.Variable:
        def one(value: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            place = NamedSharding(mesh, spec(value.shape, leaf.axes, mesh))
            return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=place)

        return leaf.replace(jax.tree.map(one, leaf.get_value()))  # the scales of a quantised weight like the weight

    return mapped(module, placed)


def place_of(tree) -> Sharding | None:
    """Of the first array, or shape, that is committed to a place: where JAX will run a program of these arguments."""
    for leaf in jax.tree.leaves(tree):
        if getattr(leaf, "committed", isinstance(leaf, jax.ShapeDtypeStruct)) and leaf.sharding is not None:
            return leaf.sharding
    return None


def mesh_of(tree) -> Mesh | None:
    """That a module, or any arrays, lie on."""
    return mesh_at(place_of(tree))


def mesh_at(place: Sharding | None) -> Mesh | None:
    return place.mesh if isinstance(place, NamedSharding) else None


def row_shards(tree, rows: int = 0) -> int:
    """Over how many devices rows are split: those of the mesh's `data` axis, where they divide `rows`."""
    mesh = mesh_of(tree)
    count = 1 if mesh is None else mesh.shape[DATA]
    return 1 if rows % count else count


def _current_mesh() -> AbstractMesh | None:
    """That the program is traced for; none where it is not one of these axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.axis_names == AXES else None
