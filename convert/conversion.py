"""Writing a converted folder, a piece at a time; a conversion that was killed goes on where it was.

A converted folder holds `params/` (`pieces.py`), `config.json` and the tokenizer and processor files of its source, and
`reroute_jax.json`, which is written last. Until then it is called `OUT.partial`.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from threading import Condition, Lock
from typing import Any

import jax
import numpy as np
from filelock import FileLock, Timeout

import reroute_jax
from convert import pieces
from convert.checkpoint import Progress, Target, converted, fitted, placed, unquantised
from convert.safetensors import DTYPES, INDEX_NAME, Tensor
from convert.source import COMPANIONS, FORMAT, MANIFEST_NAME, Manifest, Source
from convert.table import Assignment
from reroute_jax.config import ModelConfig
from reroute_jax.errors import RerouteError
from reroute_jax.mesh import arranged
from reroute_jax.nn.params import named_parameters
from reroute_jax.nn.quantised import with_quantised
from reroute_jax.nn.sharding import on_mesh
from reroute_jax.types import FLOATS

PIECE_BYTES = 2**27
# One piece is read while another is written.
WORKERS = 2
_IDENTITY_NAME = "conversion.json"
_LOCK_NAME = ".lock"

Planned = Sequence[tuple[Assignment, Tensor]]


def stored_params(config: ModelConfig, quantise: str | None = None) -> dict[str, Any]:
    """Every parameter of the model, laid out over all devices of the host in the chunks that it is stored in."""
    devices = np.array(jax.local_devices(backend="cpu"))[None]
    module = reroute_jax.abstract_params(config)
    if quantise is not None:
        module = with_quantised(module, quantise)
    return named_parameters(on_mesh(module, arranged(devices, config.decoder.num_kv_heads)))


def save_converted(
    source: Source,
    out: Path,
    planned: Planned,
    target: Target,
    dtype: str | None,
    progress: Progress = lambda nbytes: None,
) -> Manifest:
    """Write the converted folder `out`, which appears whole, at the end, or not at all.

    `planned` is what `plan` returned for `target`, `dtype` as in `load_params`. In memory are two pieces of
    PIECE_BYTES, or one tensor that is larger. `progress` is told the stored bytes of each piece, those included that a
    killed conversion wrote. Raises RerouteError if `out` exists, it cannot be written, the disk is too small, a value
    does not fit `dtype`, or a conversion of something else is in the making there.
    """
    check_free(out)
    try:
        with _making(out, _identity(source, planned, target, dtype)) as partial:
            _save_pieces(partial, planned, target, dtype, progress)
            manifest = _finish(partial, source, planned, target, dtype)
            check_free(out)
            partial.rename(out)
            (out / _IDENTITY_NAME).unlink()  # only now: until then a kill may leave the pieces, and they tell whose
    except RerouteError:
        raise
    except (OSError, ValueError) as problem:  # Orbax's writers raise ValueError for a full disk
        reason = getattr(problem, "strerror", None) or " ".join(str(problem).split())[:200]
        raise RerouteError(f"{out} cannot be written ({reason}): choose another folder, or make room") from problem
    return manifest


def check_free(out: Path) -> None:
    """Raise RerouteError if `out` exists: a conversion never overwrites."""
    if out.exists() or out.is_symlink():
        raise RerouteError(f"{out} already exists: delete it or choose another name")


@contextmanager
def _making(out: Path, identity: dict) -> Iterator[Path]:
    """The folder that becomes `out`, with what a killed conversion of the same left there, for this process alone.

    It is removed where the conversion fails, and stays where it is killed or interrupted.
    """
    partial = out.with_name(f"{out.name}.partial")
    (partial / pieces.FOLDER).mkdir(parents=True, exist_ok=True)
    lock = FileLock(partial / _LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RerouteError(f"another process writes {out}: wait for it, or choose another folder") from error
    try:
        _settle(partial, identity)
        yield partial
    except Exception as error:
        if not isinstance(error, _Foreign):
            shutil.rmtree(partial)
        raise
    finally:
        lock.release()


class _Foreign(RerouteError):
    """What lies there is another conversion's."""


def _settle(partial: Path, identity: dict) -> None:
    """Raises RerouteError for pieces of something else. The identity is there whole or not at all."""
    file = partial / _IDENTITY_NAME
    if not file.exists():
        part = file.with_name(f"{file.name}.part")
        part.write_text(json.dumps(identity))
        part.replace(file)
    elif _read_identity(file) != identity:
        raise _Foreign(
            f"{partial} is part of another conversion, of other files or dtypes: delete it, or finish that one"
        )


def _read_identity(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except ValueError:
        return None


def _identity(source: Source, planned: Planned, target: Target, dtype: str | None) -> dict:
    """What must be the same for the pieces of a conversion to belong together."""
    files = {str(file): file.stat() for file in {tensor.file.resolve() for _, tensor in planned}}
    return {
        "format": FORMAT,
        "piece_bytes": PIECE_BYTES,
        "dtype": dtype,
        "quantise": _kind(target),
        "config": source.config,
        "files": {name: [state.st_size, state.st_mtime_ns] for name, state in sorted(files.items())},
    }


def _save_pieces(partial: Path, planned: Planned, target: Target, dtype: str | None, progress: Progress) -> None:
    parts = list(enumerate(_pieces(planned, dtype)))
    done = pieces.finished(partial)
    needed = sum(_stored_bytes(part, target, dtype) for number, part in parts if number not in done)
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise RerouteError(f"{partial} needs {needed:,} bytes, the disk has {free:,}: free some or choose another")
    memory = _Budget(max(WORKERS * PIECE_BYTES, *(_nbytes(tensor, dtype) for _, tensor in planned)))
    # Of 400 small checkpoints that two threads saved at once, Orbax 0.12.8 lost 14: its operations share one number.
    saving = Lock()

    def chunked(tensor: Tensor, wanted: Any) -> Any:
        place = unquantised(wanted)
        if tensor.nbytes > PIECE_BYTES:  # by its chunks, and never twice in memory
            return fitted(placed(tensor, place, dtype), wanted)
        return fitted(jax.device_put(converted(tensor, place.shape, dtype), place.sharding), wanted)

    def write(numbered: tuple[int, Planned]) -> int:
        number, part = numbered
        if number not in done:
            with memory.share(sum(_nbytes(tensor, dtype) for _, tensor in part)):
                params = {one.path: chunked(tensor, target[one.path]) for one, tensor in part}
                with saving:
                    pieces.save(partial, number, params)
        return sum(tensor.nbytes for _, tensor in part)

    with ThreadPoolExecutor(WORKERS) as pool:
        for nbytes in pool.map(write, parts):
            progress(nbytes)


def _pieces(planned: Planned, dtype: str | None) -> Iterator[Planned]:
    """Consecutive tensors of at most PIECE_BYTES together, or one larger."""
    piece, size = [], 0
    for assignment, tensor in planned:
        nbytes = _nbytes(tensor, dtype)
        if piece and size + nbytes > PIECE_BYTES:
            yield piece
            piece, size = [], 0
        piece.append((assignment, tensor))
        size += nbytes
    yield piece


def _stored_bytes(planned: Planned, target: Target, dtype: str | None) -> int:
    """Of int8, int4 (a byte each, too) and numbers in their dtype."""
    total = 0
    for assignment, tensor in planned:
        numbers = target[assignment.path]
        if not isinstance(numbers, jax.ShapeDtypeStruct):
            total += numbers.qvalue.size
            numbers = numbers.scale
        total += numbers.size * _dtype(tensor, dtype).itemsize
    return total


def _kind(target: Target) -> str | None:
    """That parameters are quantised to."""
    return next((wanted.qtype for wanted in target.values() if not isinstance(wanted, jax.ShapeDtypeStruct)), None)


def _dtype(tensor: Tensor, dtype: str | None) -> np.dtype:
    return FLOATS[dtype] if dtype else DTYPES[tensor.dtype]


def _nbytes(tensor: Tensor, dtype: str | None) -> int:
    """Before it is quantised."""
    return math.prod(tensor.shape) * _dtype(tensor, dtype).itemsize


class _Budget:
    """Bytes that threads hold at a time: who would take the sum beyond `limit` waits. No share may be larger."""

    def __init__(self, limit: int) -> None:
        self._left, self._changed = limit, Condition()

    @contextmanager
    def share(self, nbytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: nbytes <= self._left)
            self._left -= nbytes
        try:
            yield
        finally:
            with self._changed:
                self._left += nbytes
                self._changed.notify_all()


def _finish(partial: Path, source: Source, planned: Planned, target: Target, dtype: str | None) -> Manifest:
    """Everything beside the pieces, the manifest last."""
    for file in _companions(source.folder):
        shutil.copyfile(file, partial / file.name)
    (partial / "config.json").write_text(json.dumps(source.config, indent=2) + "\n")
    manifest = Manifest(
        format=FORMAT,
        source=source.name,
        dtype=dtype,
        quantise=_kind(target),
        tensors=len(planned),
        parameters=sum(math.prod(tensor.shape) for _, tensor in planned),
        nbytes=_stored_bytes(planned, target, dtype),
        files=pieces.file_sizes(partial),
    )
    (partial / _LOCK_NAME).unlink()
    (partial / MANIFEST_NAME).write_text(json.dumps(asdict(manifest), indent=2) + "\n")
    return manifest


def _companions(folder: Path) -> list[Path]:
    files = {file for pattern in COMPANIONS for file in folder.glob(pattern)}
    return sorted(file for file in files if file.name not in (INDEX_NAME, MANIFEST_NAME))
