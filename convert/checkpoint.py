"""Parameters of a Hugging Face folder or a converted one, read tensor by tensor onto their devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert import pieces
from convert.dropped import compare_dropped, refuse_quantised
from convert.safetensors import Tensor, list_folder, read, read_part, write_folder
from convert.source import Source
from convert.table import Assignment, ConversionTable, hf_shapes, match, raise_report, to_hf
from convert.values import cast, finite, not_finite
from reroute_jax.errors import RerouteError
from reroute_jax.nn.params import named_parameters, with_parameters
from reroute_jax.nn.quantised import quantised
from reroute_jax.types import FLOATS

Progress = Callable[[int], object]
# Shapes, with their places where they have one; `qwix.QArray`s of them where parameters are to be quantised.
Target = Mapping[str, Any]


def load_params(
    source: Source,
    target: Target,
    table: ConversionTable,
    dtype: str | None = None,
    progress: Progress = lambda nbytes: None,
) -> dict[str, Any]:
    """The parameters `target` (path -> shape, and sharding where it has one), read one tensor at a time.

    `dtype` is one of `FLOATS`, or None for the stored one. `progress` is told the stored bytes of each tensor.
    Raises RerouteError for a checkpoint that is damaged or does not fit `target`.
    """
    if source.manifest is not None:
        return _restore(source, target, dtype, progress)
    params = {}
    for assignment, tensor in plan(source, target, table):
        # Waiting keeps the host copies of earlier tensors from piling up.
        wanted = target[assignment.path]
        params[assignment.path] = jax.block_until_ready(fitted(placed(tensor, unquantised(wanted), dtype), wanted))
        progress(tensor.nbytes)
    return params


def plan(source: Source, target: Target, table: ConversionTable) -> list[tuple[Assignment, Tensor]]:
    """Which tensor of a Hugging Face folder becomes which parameter, in file order; only headers are read.

    Raises RerouteError with everything that does not fit in one report.
    """
    tensors = list_folder(source.folder)
    refuse_quantised(source.name, tensors)
    entries = [(tensor.key, tensor.dtype, tensor.shape) for tensor in tensors]
    assignments = match(table, entries, {path: value.shape for path, value in target.items()}, source.name)
    compare_dropped(source.name, tensors, table)
    named = {tensor.key: tensor for tensor in tensors}
    return [(assignment, named[assignment.key]) for assignment in assignments]


def save_hf(folder: Path, params: Mapping[str, jax.Array], table: ConversionTable, dtype: str, shards: int = 1) -> None:
    """Write `params` (path -> array) as safetensors in Hugging Face's form; one tensor at a time is on the host.

    config.json, tokenizer and image processor are the caller's to add. Raises RerouteError if a value does not fit
    `dtype`.
    """
    tensors = to_hf(table, params)

    def produce(key: str) -> np.ndarray:
        made, value = next(tensors)
        assert made == key
        return cast(key, value, dtype)

    shapes = hf_shapes(table, {path: value.shape for path, value in params.items()})
    write_folder(folder, shapes, FLOATS[dtype], produce, shards)


def _restore(source: Source, target: Target, dtype: str | None, progress: Progress) -> dict[str, Any]:
    _check_files(source)
    reading = target if source.manifest.quantise else {path: unquantised(wanted) for path, wanted in target.items()}
    places, stored = pieces.flat(reading), pieces.stored_shapes(source.folder)
    _check_stored(source, stored, places)
    wanted = {
        name: jax.ShapeDtypeStruct(value.shape, _restored_dtype(value.dtype, dtype), sharding=_sharding(places[name]))
        for name, value in stored.items()
    }
    found: dict[str, Any] = {}
    for piece in pieces.restored(source.folder, wanted):
        for name, value in piece.items():
            if jnp.issubdtype(value.dtype, jnp.floating) and not _finite(value):
                raise RerouteError(not_finite(name, dtype))
            found[name] = value if source.manifest.quantise else fitted(value, target[name])
        progress(sum(stored[name].size * stored[name].dtype.itemsize for name in piece))
    if not source.manifest.quantise:
        return found
    return jax.tree.unflatten(jax.tree.structure(dict(target)), [found[name] for name in places])


@jax.jit
def _finite(value: jax.Array) -> jax.Array:
    return jnp.isfinite(value).all()


def _restored_dtype(stored: np.dtype, dtype: str | None) -> np.dtype:
    return FLOATS[dtype] if dtype and jnp.issubdtype(stored, jnp.floating) else stored


def unquantised(wanted: Any) -> jax.ShapeDtypeStruct:
    """The shape and place of a parameter before it is quantised."""
    return wanted if isinstance(wanted, jax.ShapeDtypeStruct) else wanted.qvalue


def fitted(value: jax.Array, wanted: Any) -> Any:
    """The parameter, quantised where that is wanted."""
    if isinstance(wanted, jax.ShapeDtypeStruct):
        return value
    return jax.tree.map(
        lambda part, place: jax.device_put(part, _sharding(place)), quantised(value, wanted.qtype), wanted
    )


def fitted_module(module: nnx.Module, wanted: nnx.Module) -> nnx.Module:
    """The same parameters, quantised where those of `wanted` are, a module of shapes."""
    shapes = named_parameters(wanted)
    return with_parameters(
        wanted, {path: fitted(value, shapes[path]) for path, value in named_parameters(module).items()}
    )


def _check_files(source: Source) -> None:
    """Missing and truncated files are found here, because Orbax answers them with pages of its own state."""
    found = pieces.file_sizes(source.folder)
    for name, size in source.manifest.files.items():
        if found.get(name) != size:
            state = f"has {found[name]} bytes, expected {size}" if name in found else "is missing"
            raise RerouteError(f"{source.name} is damaged: {name} {state}: convert again")


def _check_stored(source: Source, stored: Mapping, target: Target) -> None:
    misshaped = [
        f"{path} is {list(value.shape)}, expected {list(target[path].shape)}"
        for path, value in stored.items()
        if path in target and tuple(value.shape) != tuple(target[path].shape)
    ]
    raise_report(
        f"converted checkpoint {source.name} does not fit its config.json",
        {
            "unknown": [path for path in stored if path not in target],
            "missing": [path for path in target if path not in stored],
            "mis-shaped": misshaped,
        },
    )


def placed(tensor: Tensor, target: jax.ShapeDtypeStruct, dtype: str | None) -> jax.Array:
    """The parameter on its devices, each of which gets its own part of the file; one part at a time is on the host."""
    place = _sharding(target)
    if len(place.device_set) == 1:
        return jax.device_put(converted(tensor, target.shape, dtype), place)
    users: dict[str, list[jax.Device]] = {}  # by part: slices have no hash before Python 3.12
    indices = place.addressable_devices_indices_map(target.shape)
    for device, index in indices.items():
        users.setdefault(str(index), []).append(device)
    shards = {}
    for devices in users.values():
        part = _checked(tensor.key, read_part(tensor, target.shape, indices[devices[0]]), dtype)
        shards |= {device: jax.device_put(part, device) for device in devices}
    return jax.make_array_from_single_device_arrays(target.shape, place, [shards[device] for device in indices])


def converted(tensor: Tensor, shape: tuple[int, ...], dtype: str | None) -> np.ndarray:
    return _checked(tensor.key, read(tensor), dtype).reshape(shape)


def _checked(key: str, value: np.ndarray, dtype: str | None) -> np.ndarray:
    """In `dtype`. Raises RerouteError for what is not finite in it."""
    if not finite(value):
        raise RerouteError(not_finite(key, None))
    return cast(key, value, dtype) if dtype else value


def _sharding(value: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    return value.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
