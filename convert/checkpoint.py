"""Reading parameters from a Hugging Face folder or a converted one, and writing a converted one, tensor by tensor.

A converted folder holds `params/` (an Orbax checkpoint: one flat dict, parameter path -> array), `config.json` and the
tokenizer and processor files of its source, and `reroute_jax.json`, which is written last: a folder without it is not a
converted checkpoint.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from convert.dropped import compare_dropped, refuse_quantised
from convert.safetensors import DTYPES, INDEX_NAME, Tensor, list_folder, read, read_part, write_folder
from convert.source import COMPANIONS, FORMAT, MANIFEST_NAME, Manifest, Source
from convert.table import Assignment, ConversionTable, hf_shapes, match, raise_report, to_hf
from convert.values import cast, finite, not_finite
from reroute_jax.errors import RerouteError
from reroute_jax.types import FLOATS

_RESTORE_BYTES = 10**9

Progress = Callable[[int], object]
Target = Mapping[str, jax.ShapeDtypeStruct]


def load_params(
    source: Source,
    target: Target,
    table: ConversionTable,
    dtype: str | None = None,
    progress: Progress = lambda nbytes: None,
) -> dict[str, jax.Array]:
    """The parameters `target` (path -> shape, and sharding where it has one), read one tensor at a time.

    `dtype` is one of `FLOATS`, or None for the stored one. `progress` is told the stored bytes of each tensor.
    Raises RerouteError for a checkpoint that is damaged or does not fit `target`.
    """
    if source.manifest is not None:
        return _restore(source, target, dtype, progress)
    params = {}
    for assignment, tensor in plan(source, target, table):
        # Waiting keeps the host copies of earlier tensors from piling up.
        params[assignment.path] = _placed(tensor, target[assignment.path], dtype).block_until_ready()
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


def save_converted(
    source: Source,
    out: Path,
    planned: Sequence[tuple[Assignment, Tensor]],
    target: Target,
    dtype: str | None,
    progress: Progress = lambda nbytes: None,
) -> Manifest:
    """Write the converted folder `out`, holding one tensor at a time; it appears whole, at the end, or not at all.

    `planned` is what `plan` returned, `dtype` and `progress` as in `load_params`. Raises RerouteError if `out` exists,
    it cannot be written, the disk is too small, or a value does not fit `dtype`.
    """
    check_free(out)
    try:
        return _save_converted(source, out, planned, target, dtype, progress)
    except RerouteError:
        raise
    except (OSError, ValueError) as problem:  # Orbax's writers raise ValueError for a full disk
        reason = getattr(problem, "strerror", None) or " ".join(str(problem).split())[:200]
        raise RerouteError(f"{out} cannot be written ({reason}): choose another folder, or make room") from problem


def _save_converted(
    source: Source,
    out: Path,
    planned: Sequence[tuple[Assignment, Tensor]],
    target: Target,
    dtype: str | None,
    progress: Progress,
) -> Manifest:
    sizes = [math.prod(tensor.shape) for _, tensor in planned]
    kinds = [FLOATS[dtype] if dtype else DTYPES[tensor.dtype] for _, tensor in planned]
    nbytes = sum(size * kind.itemsize for size, kind in zip(sizes, kinds, strict=True))
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < nbytes:
        raise RerouteError(f"{out} needs {nbytes:,} bytes, the disk has {free:,}: free some or choose another")
    partial = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        partial.mkdir()
        _save_arrays(partial / "params", planned, target, dtype, progress)
        for file in _companions(source.folder):
            shutil.copyfile(file, partial / file.name)
        (partial / "config.json").write_text(json.dumps(source.config, indent=2) + "\n")
        files = _file_sizes(partial)
        manifest = Manifest(FORMAT, source.name, dtype, len(planned), sum(sizes), nbytes, files)
        (partial / MANIFEST_NAME).write_text(json.dumps(asdict(manifest), indent=2) + "\n")
        check_free(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


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


def check_free(out: Path) -> None:
    """Raise RerouteError if `out` exists: a conversion never overwrites."""
    if out.exists() or out.is_symlink():
        raise RerouteError(f"{out} already exists: delete it or choose another name")


def leftovers(out: Path) -> list[Path]:
    """Folders that killed conversions to `out` left beside it. They never load and may be deleted."""
    return sorted(out.parent.glob(f"{out.name}.tmp-*"))


class _Pending:
    """A leaf whose value is made only when it is written."""

    def __init__(self, produce: Callable[[], np.ndarray]):
        self.produce = produce


class _StreamingHandler(ocp.type_handlers.NumpyHandler):
    """Writes `_Pending` leaves as ordinary numpy arrays, one after the other.

    Orbax's own handler takes all arrays at once, that is, the whole model in memory.
    """

    async def serialize(self, values, infos, args=None):
        args = args or [ocp.SaveArgs()] * len(values)
        for value, info, arg in zip(values, infos, args, strict=True):
            for future in await super().serialize([value.produce()], [info], [arg]):
                await asyncio.to_thread(future.result)
        return []


def _save_arrays(
    folder: Path, planned: Sequence[tuple[Assignment, Tensor]], target: Target, dtype: str | None, progress: Progress
) -> None:
    def pending(assignment: Assignment, tensor: Tensor) -> _Pending:
        def produce() -> np.ndarray:
            value = _converted(tensor, target[assignment.path].shape, dtype)
            progress(tensor.nbytes)
            return value

        return _Pending(produce)

    registry = ocp.type_handlers.create_type_handler_registry(
        (_Pending, _StreamingHandler(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    # Compression of bfloat16 noise saves a quarter of the disk and costs a third of the time.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    tree = {assignment.path: pending(assignment, tensor) for assignment, tensor in planned}
    with _without_log("absl"), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(tree))


@contextmanager
def _without_log(name: str) -> Iterator[None]:
    """Orbax logs the traceback of an error that it raises as well, which is said in one line."""
    log = logging.getLogger(name)
    log.disabled, before = True, log.disabled
    try:
        yield
    finally:
        log.disabled = before


def _restore(source: Source, target: Target, dtype: str | None, progress: Progress) -> dict[str, jax.Array]:
    _check_files(source)
    folder = (source.folder / "params").absolute()
    params: dict[str, jax.Array] = {}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        stored = dict(checkpointer.metadata(folder).item_metadata.tree)
        _check_stored(source, stored, target)
        for batch in _batches(stored):
            params |= checkpointer.restore(folder, args=_restore_args(batch, target, dtype))
            progress(sum(_nbytes(value) for value in batch.values()))
    for path, value in params.items():
        if not jax.numpy.isfinite(value).all():
            raise RerouteError(not_finite(path, dtype))
    return params


def _check_files(source: Source) -> None:
    """Missing and truncated files are found here, because Orbax answers them with pages of its own state."""
    found = _file_sizes(source.folder)
    for name, size in source.manifest.files.items():
        if found.get(name) != size:
            state = f"has {found[name]} bytes, expected {size}" if name in found else "is missing"
            raise RerouteError(f"{source.name} is damaged: {name} {state}: convert again")


def _file_sizes(folder: Path) -> dict[str, int]:
    """Every file of the parameters, by its path in the converted folder."""
    files = sorted(file for file in (folder / "params").rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def _restore_args(batch: Mapping, target: Target, dtype: str | None) -> ocp.args.PyTreeRestore:
    arguments = {
        path: ocp.ArrayRestoreArgs(
            restore_type=jax.Array, dtype=FLOATS[dtype] if dtype else None, sharding=_sharding(target[path])
        )
        for path in batch
    }
    return ocp.args.PyTreeRestore(item=dict(batch), restore_args=arguments, partial_restore=True)


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


def _batches(stored: Mapping) -> Iterator[dict]:
    """Consecutive leaves of at most `_RESTORE_BYTES` together (or one larger): what Orbax reads at once."""
    batch: dict = {}
    for path, value in stored.items():
        if batch and sum(map(_nbytes, batch.values())) + _nbytes(value) > _RESTORE_BYTES:
            yield batch
            batch = {}
        batch[path] = value
    yield batch


def _nbytes(value) -> int:
    return math.prod(value.shape) * np.dtype(value.dtype).itemsize


def _placed(tensor: Tensor, target: jax.ShapeDtypeStruct, dtype: str | None) -> jax.Array:
    """The parameter on its devices, each of which gets its own part of the file."""
    place, parts = _sharding(target), {}
    if len(place.device_set) == 1:
        return jax.device_put(_converted(tensor, target.shape, dtype), place)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        its = str(index)  # slices have no hash before Python 3.12
        if its not in parts:
            parts[its] = _checked(tensor.key, read_part(tensor, target.shape, index), dtype)
        return parts[its]

    return jax.make_array_from_callback(target.shape, place, part)


def _converted(tensor: Tensor, shape: tuple[int, ...], dtype: str | None) -> np.ndarray:
    return _checked(tensor.key, read(tensor), dtype).reshape(shape)


def _checked(key: str, value: np.ndarray, dtype: str | None) -> np.ndarray:
    """In `dtype`. Raises RerouteError for what is not finite in it."""
    if not finite(value):
        raise RerouteError(not_finite(key, None))
    return cast(key, value, dtype) if dtype else value


def _sharding(value: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    return value.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _companions(folder: Path) -> list[Path]:
    files = {file for pattern in COMPANIONS for file in folder.glob(pattern)}
    return sorted(file for file in files if file.name not in (INDEX_NAME, MANIFEST_NAME))
