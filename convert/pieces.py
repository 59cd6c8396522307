"""Parameters of a converted folder: Orbax checkpoints of a few tensors each, in the v1 API.

A piece is there whole or not at all, so a conversion that was killed goes on behind those that are there. Large arrays
lie in as many chunks as a mesh of all host devices has for them: a model on a mesh reads its devices' own chunks.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

FOLDER = "params"
# Into how many chunks an array is cut at most: those of a mesh with model=16, and of its divisors.
PARTS = 16


def save(folder: Path, number: int, params: Mapping[str, Any]) -> None:
    """Write piece `number` of the converted folder."""
    # Compression of bfloat16 noise saves a quarter of the disk and costs a third of the time.
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.enable_write_sharding_file = False  # the host's devices mean nothing to a reader
    context.array.saving.use_replica_parallel = False  # it would cut copies into chunks of their own
    with _without_log("absl"), context:
        ocp.save((folder / FOLDER / _name(number)).absolute(), flat(params))


def flat(params: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays, or shapes, by the names that they are stored under; a quantised one's are `PATH.qvalue`, `PATH.scale`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(dict(params))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def finished(folder: Path) -> set[int]:
    """The numbers of the pieces that are there. What a killed process left of another is removed."""
    found = set()
    for path in (folder / FOLDER).iterdir():
        if path.name.isdigit():
            found.add(int(path.name))
        else:
            shutil.rmtree(path)
    return found


def stored_shapes(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter of a converted folder; no array is read."""
    return {
        path: jax.ShapeDtypeStruct(value.shape, value.dtype)
        for piece in _all(folder)
        for path, value in ocp.metadata(piece).metadata.items()
    }


def restored(folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[dict[str, jax.Array]]:
    """The parameters, a piece at a time, in the dtypes and at the places that `wanted` gives all of them."""
    for piece in _all(folder):
        yield ocp.load(piece, {path: wanted[path] for path in ocp.metadata(piece).metadata})


def file_sizes(folder: Path) -> dict[str, int]:
    """Every file of the parameters, by its path in the converted folder."""
    files = sorted(file for file in (folder / FOLDER).rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def _all(folder: Path) -> list[Path]:
    return sorted((folder / FOLDER).absolute().iterdir())


def _name(number: int) -> str:
    return f"{number:05d}"


@contextmanager
def _without_log(name: str) -> Iterator[None]:
    """Orbax logs the traceback of an error that it raises as well, which is said in one line."""
    log = logging.getLogger(name)
    log.disabled, before = True, log.disabled
    try:
        yield
    finally:
        log.disabled = before
