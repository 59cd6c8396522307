"""What the answers of a run depend on beyond its command: the content of data and model, the software, the device."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import convert
import evals
import reroute_jax
from reroute_jax.routing.found import is_found

# Whose code makes pixels, ids, logits or tokens: another version of these may answer differently.
PACKAGES = ("jax", "jaxlib", "flax", "transformers", "tokenizers", "numpy", "pillow")
QUANTISER = "qwix"  # of an extra: makes the numbers of int8 and int4 weights
SOURCES = (reroute_jax, convert, evals)

_READ_WHOLE = 1 << 30  # bytes: what is together no larger is read as a whole, in a second or two
_BLOCK, _BLOCKS = 1 << 12, 16  # of each larger file, so many blocks of so many bytes, spread evenly
ABSENT = "absent"


def fingerprint(path: Path) -> str:
    """16 hex digits that change when a file in `path` (a file or folder) is replaced, found schedules aside, which a
    run tells itself; cost as of `files_digest`."""
    if path.is_file():
        return files_digest({path.name: path})
    found = sorted(file for file in path.rglob("*") if file.is_file() and not is_found(file))
    return files_digest({str(file.relative_to(path)): file for file in found})


def files_digest(files: Mapping[str, Path]) -> str:
    """16 hex digits of named files: their names, sizes and content, in whatever order they come.

    Read as a whole up to 1 GiB together. Beyond that, 16 blocks of 4 KiB of each, both ends among them: 64 KiB, so
    2.6 GB for the 40,504 images of VQAv2's validation split and 0.4 MB for a 14 GB checkpoint in six files. A change
    that falls between all blocks and keeps the size goes unseen there; a re-encoded image or another training step
    does not. Times of change are left out, because copies have their own. A file that is not there, or cannot be
    read, counts as such.
    """
    sizes = {name: _size(file) for name, file in files.items()}
    whole = sum(size for size in sizes.values() if size is not None) <= _READ_WHOLE
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name!a}:{ABSENT if sizes[name] is None else sizes[name]}:".encode())
        if sizes[name] is not None:
            digest.update(_content(files[name], sizes[name], whole))
    return digest.hexdigest()[:16]


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size if os.access(file, os.R_OK) else None
    except (OSError, ValueError):
        return None


def _content(file: Path, size: int, whole: bool) -> bytes:
    """Digest of the file's content, or of its blocks."""
    with open(file, "rb") as opened:
        if whole or size <= _BLOCK * _BLOCKS:
            return hashlib.file_digest(opened, "sha256").digest()
        digest = hashlib.sha256()
        for number in range(_BLOCKS):
            opened.seek(number * (size - _BLOCK) // (_BLOCKS - 1))
            digest.update(opened.read(_BLOCK))
        return digest.digest()


def images_digest(images: Iterable[Path | None]) -> str | None:
    """Of the image files that questions name, each once; None where they name none."""
    files = {str(file): file for file in images if file is not None}
    return files_digest(files) if files else None


def checkpoint_identity(path: Path, loaded_from: Path) -> dict[str, str | None]:
    """Of a model: a local folder or file `path` with its content, a hub id with the commit of its snapshot.

    loaded_from: the folder that the weights were read from, in the hub's cache .../snapshots/COMMIT.
    """
    if path.exists():
        return {"model_files": fingerprint(path), "model_revision": None}
    if loaded_from.parent.name == "snapshots":
        return {"model_files": None, "model_revision": loaded_from.name}
    return {"model_files": fingerprint(loaded_from), "model_revision": None}


def software() -> dict[str, Any]:
    """Python, packages, this project's own code, and what XLA computes on and with."""
    device = jax.local_devices()[0]
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),  # a patch release mends, and draws no other numbers
        **versions(),
        QUANTISER: _version_if_any(QUANTISER),
        "sources": sources_digest(),
        "device": device.device_kind,
        "backend": " ".join(device.client.platform_version.split()),
        "matmul_precision": jax.config.jax_default_matmul_precision,
        "x64": jax.config.jax_enable_x64,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "libtpu_init_args": os.environ.get("LIBTPU_INIT_ARGS", ""),
    }


def versions() -> dict[str, str]:
    return {package: metadata.version(package) for package in PACKAGES}


def _version_if_any(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def sources_digest() -> str:
    """Of all Python files of this project's packages."""
    return files_digest(
        {
            f"{package.__name__}/{file.relative_to(folder)}": file
            for package in SOURCES
            for folder in map(Path, package.__path__)
            for file in folder.rglob("*.py")
        }
    )


def changes(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between the settings of a folder and those of now, one sentence each; mappings by their keys."""
    differing = []
    for key in sorted(wanted.keys() | found.keys()):
        old, new = found.get(key), wanted.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            differing += [f"{key}.{change}" for change in changes(old, new)]
        elif old != new:
            differing.append(f"{key}: {old!r} there, {new!r} now")
    return differing
