"""Safetensors files through plain reads and writes: one tensor in memory at a time, bfloat16 included.

What lies together is read; other parts of a tensor are mapped, for as long as it takes to copy them: mapped pages of a
14 GB checkpoint would count as this process's memory.
Format: https://huggingface.co/docs/safetensors (8-byte little-endian header length, JSON header, tensor bytes).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reroute_jax.errors import RerouteError
from reroute_jax.types import FLOATS

# Of parameters.
DTYPES = {"F32": FLOATS["float32"], "F16": FLOATS["float16"], "BF16": FLOATS["bfloat16"]}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BUFFER_DTYPES = {"F64": np.dtype("<f8"), "I64": np.dtype("<i8"), "I32": np.dtype("<i4")}
INDEX_NAME = "model.safetensors.index.json"
# The limit of the reference implementation.
_MAX_HEADER_BYTES = 100_000_000
_INDEX_SUFFIX = ".safetensors.index.json"
_BLOCK = 2**24  # numbers
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
FOREIGN_SUFFIXES = (".gguf", ".onnx", ".h5", ".msgpack", ".npz")


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: its bytes are [start, start + nbytes). `dtype` is safetensors' own name of it."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int


def read(tensor: Tensor) -> np.ndarray:
    """The tensor in its stored dtype, which must be one of `DTYPES`, or one that buffers have."""
    return _numbers(tensor, 0, math.prod(tensor.shape)).reshape(tensor.shape)


def read_part(tensor: Tensor, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
    """A part of the tensor alone, a slice of each axis. shape: that its numbers, in their order, are seen in."""
    starts, stops, _ = zip(*(one.indices(size) for one, size in zip(index, shape, strict=True)), strict=True)
    part = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
    if part[1:] == shape[1:]:
        row = math.prod(shape[1:])
        return _numbers(tensor, starts[0] * row, part[0] * row).reshape(part)
    try:
        return np.array(np.memmap(tensor.file, _dtype(tensor), "r", tensor.start, shape)[index])
    except ValueError as error:  # the file is shorter than the map
        raise RerouteError(_cut_short(tensor)) from error


def _numbers(tensor: Tensor, first: int, count: int) -> np.ndarray:
    """`count` of them in their order, from the one with the number `first`."""
    kind = _dtype(tensor)
    with tensor.file.open("rb") as file:
        values = np.fromfile(file, kind, count, offset=tensor.start + first * kind.itemsize)
    if len(values) != count:
        raise RerouteError(_cut_short(tensor))
    return values


def _dtype(tensor: Tensor) -> np.dtype:
    kind = (DTYPES | _BUFFER_DTYPES).get(tensor.dtype)
    if kind is None:
        raise RerouteError(f"{tensor.key} is {tensor.dtype}, expected one of {', '.join(DTYPES)}")
    return kind


def _cut_short(tensor: Tensor) -> str:
    return f"{tensor.file} ended inside tensor {tensor.key}: it changed while it was read, try again"


def equal(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors hold the same numbers; a block of each is in memory at a time."""
    if left.shape != right.shape or not {left.dtype, right.dtype} <= set(DTYPES):
        return False
    size = math.prod(left.shape)
    return all(
        np.array_equal(_block(left, first, size), _block(right, first, size)) for first in range(0, size, _BLOCK)
    )


def _block(tensor: Tensor, first: int, size: int) -> np.ndarray:
    return _numbers(tensor, first, min(_BLOCK, size - first)).astype(np.float32, copy=False)


def list_folder(folder: Path) -> list[Tensor]:
    """Every tensor of the checkpoint in `folder`, by file and position; duplicates included.

    Shards are those of the index where there is one, else all `*.safetensors`. Raises RerouteError for a folder without
    safetensors or with those of two checkpoints, an index that does not agree with its shards, and a corrupt or
    truncated file.
    """
    files = sorted(folder.glob("*.safetensors"))
    indexes = sorted(folder.glob(f"*{_INDEX_SUFFIX}"))
    if len(indexes) > 1:
        raise RerouteError(_two_checkpoints(folder, indexes[0].name, indexes[1].name))
    if indexes:
        return _list_indexed(indexes[0], _read_index(indexes[0]), files)
    if not files:
        raise RerouteError(_no_weights(folder))
    _check_shards(folder, [file.name for file in files])
    return [tensor for file in files for tensor in read_header(file)]


def read_header(file: Path) -> list[Tensor]:
    """The tensors of one file, by position. Raises RerouteError for a corrupt or truncated file."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        prefix = opened.read(8)
        length = int.from_bytes(prefix, "little")
        if prefix == b"version ":
            raise RerouteError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder")
        if len(prefix) < 8 or length > _MAX_HEADER_BYTES:
            raise RerouteError(f"{file} is not a safetensors file (bad header length): download it again")
        if length > size - 8:
            raise RerouteError(f"{file} is truncated: {size} bytes, expected more than {8 + length}: download it again")
        text = opened.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique_keys)
        header.pop("__metadata__", None)
        tensors = [_entry(key, fields, file, 8 + length) for key, fields in header.items()]
        tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
        end = _check_layout(tensors, 8 + length)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RerouteError(f"{file} has a corrupt safetensors header ({error}): download it again") from error
    if end != size:
        state = "is truncated" if size < end else "has bytes after its last tensor"
        raise RerouteError(f"{file} {state}: {size} bytes, expected {end}: download it again")
    return tensors


def write_folder(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    produce: Callable[[str], np.ndarray],
    shards: int = 1,
) -> None:
    """Write tensors of one dtype to `folder` as one file, or as `shards` files of like size with an index.

    `produce(key)` makes each tensor, once, in the order of `shapes`; nothing else is held in memory.
    """
    groups = _split(shapes, shards)
    if len(groups) == 1:
        _write_file(folder / "model.safetensors", groups[0], shapes, dtype, produce)
        return
    weight_map = {}
    for number, keys in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        _write_file(folder / name, keys, shapes, dtype, produce)
        weight_map |= dict.fromkeys(keys, name)
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2))


def _list_indexed(index: Path, weight_map: Mapping[str, str], present: Sequence[Path]) -> list[Tensor]:
    folder, files = index.parent, sorted(set(weight_map.values()))
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise RerouteError(
            f"{index} names {len(absent)} of {len(files)} shards that are not there (first: {absent[0]}): download them"
        )
    beside = [file.name for file in present if file.name not in files]
    if beside:
        raise RerouteError(_two_checkpoints(folder, f"the shards of {index.name}", beside[0]))
    tensors = [tensor for name in files for tensor in read_header(folder / name)]
    held = {(tensor.key, tensor.file.name) for tensor in tensors}
    wrong = [f"{key} in {name}" for key, name in weight_map.items() if (key, name) not in held]
    if wrong:
        raise RerouteError(
            f"{index} names {len(wrong)} tensors that their shards do not hold "
            f"(first: {wrong[0]}): index and shards are of different checkpoints"
        )
    unnamed = [f"{tensor.key} in {tensor.file.name}" for tensor in tensors if tensor.key not in weight_map]
    if unnamed:
        raise RerouteError(
            f"{index} leaves out {len(unnamed)} tensors that its shards hold (first: {unnamed[0]}): "
            "index and shards are of different checkpoints"
        )
    return tensors


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        # Names only: a shard is never looked for outside the folder.
        if not weight_map or any(Path(name).name != name for name in weight_map.values()):
            raise ValueError("weight_map must name files of the same folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RerouteError(f"{index} is corrupt ({error}): download it again") from error
    return weight_map


def _check_shards(folder: Path, names: Sequence[str]) -> None:
    """Without an index: all shards of one checkpoint, or files that are no shards."""
    shards = {name: found for name in names if (found := re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.safetensors", name))}
    if not shards:
        return
    first = next(iter(shards))
    family = shards[first].group(1, 3)
    others = [name for name in names if name not in shards or shards[name].group(1, 3) != family]
    if others:
        raise RerouteError(_two_checkpoints(folder, first, others[0]))
    stem, total = family
    wanted = [f"{stem}-{number:05d}-of-{total}.safetensors" for number in range(1, int(total) + 1)]
    absent = [name for name in wanted if name not in shards]
    if absent:
        raise RerouteError(f"{folder} lacks {len(absent)} of {len(wanted)} shards (first: {absent[0]}): download them")


def _two_checkpoints(folder: Path, one: str, other: str) -> str:
    return f"{folder} holds {one} and beside it {other}: two sets of weights, delete or move the one you do not mean"


def _no_weights(folder: Path) -> str:
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLE_SUFFIXES)
    if pickles:
        return (
            f"{folder} holds only pickle weights ({pickles[0]}), refused because unpickling can run any code: "
            "save the checkpoint as safetensors (save_pretrained of transformers does)"
        )
    foreign = sorted(file.name for file in folder.iterdir() if file.suffix in FOREIGN_SUFFIXES)
    if foreign:
        return f"{folder} holds {foreign[0]} and no safetensors: give the original Hugging Face checkpoint"
    return f"{folder} holds no weights: expected *.safetensors files (pickle .bin files are never read)"


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name occurs twice")
    return fields


def _entry(key: str, fields: Mapping, file: Path, data: int) -> Tensor:
    begin, end = fields["data_offsets"]
    dtype, shape = fields["dtype"], tuple(fields["shape"])
    if not 0 <= begin <= end:
        raise ValueError(f"bad offsets of {key}")
    if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{key} has {end - begin} bytes, which do not fit {dtype} {list(shape)}")
    return Tensor(key, dtype, shape, file, data + begin, end - begin)


def _check_layout(tensors: Sequence[Tensor], start: int) -> int:
    """The end of the last tensor. Tensors in file order must follow one another without holes or overlaps."""
    for tensor in tensors:
        if tensor.start != start:
            raise ValueError(f"{tensor.key} starts at byte {tensor.start}, expected {start}")
        start += tensor.nbytes
    return start


def _split(shapes: Mapping[str, tuple[int, ...]], shards: int) -> list[list[str]]:
    """Consecutive keys in at most `shards` groups of like size."""
    target = sum(math.prod(shape) for shape in shapes.values()) / shards
    groups: list[list[str]] = [[]]
    written = 0
    for key, shape in shapes.items():
        if groups[-1] and written >= target * len(groups):
            groups.append([])
        groups[-1].append(key)
        written += math.prod(shape)
    return groups


def _write_file(
    file: Path,
    keys: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    produce: Callable[[str], np.ndarray],
) -> None:
    # transformers asks for this entry.
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key in keys:
        end = offset + math.prod(shapes[key]) * dtype.itemsize
        header[key] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shapes[key]), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for key in keys:
            values = np.ascontiguousarray(produce(key), dtype)
            if values.shape != shapes[key]:
                raise ValueError(f"{key}: made {values.shape}, expected {shapes[key]}")
            values.tofile(opened)
