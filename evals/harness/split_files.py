"""Which files of a folder hold a split, in the hub's layout: all of them, each once, or a refusal that names them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from reroute_jax.errors import RerouteError

JSON_SUFFIXES = (".jsonl", ".json")
SUFFIXES = (".parquet", *JSON_SUFFIXES)
# SPLIT-00000-of-00004, behind which older sets of the hub have a hash; SPLIT-0, a part of unknown many; SPLIT-anything.
_SHARD = re.compile(r"(?P<split>[^-]+)-(?P<number>\d+)-of-(?P<total>\d+)(-[0-9a-f]+)?")
_PART = re.compile(r"(?P<split>[^-]+)-(?P<number>\d+)")
_NAMED = 8  # files that a message names


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split in order: FOLDER[/data]/SPLIT-00000-of-00004.parquet and on, or SPLIT.parquet (.jsonl).

    Raises RerouteError where there are none, where shards are missing or there twice, and where the split is there in
    two forms, as a file beside shards, JSON lines or a folder, which may hold the same questions.
    """
    by_split: dict[str, list[Path]] = {}
    for file in sorted(file for place in (folder, folder / "data") for file in _tables(place)):
        by_split.setdefault(file.stem.split("-")[0], []).append(file)
    if not by_split:
        raise RerouteError(
            f"{folder} holds no parquet files and no JSON lines, expected SPLIT-*.parquet in it or in its data folder"
        )
    if split not in by_split:
        raise RerouteError(f"unknown split {split!r} of {folder}: expected one of {', '.join(sorted(by_split))}")
    files = by_split[split]
    _one_form(folder, split, files)
    _all_shards(folder, split, files)
    return files


def _tables(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [file for file in folder.iterdir() if file.suffix in SUFFIXES and file.is_file()]


def _one_form(folder: Path, split: str, files: Sequence[Path]) -> None:
    forms = {_form(file): file for file in reversed(files)}
    beside = [place for place in (folder / split, folder / "data" / split) if _tables(place)]
    if len(forms) + len(beside) > 1:
        found = ", ".join(str(one) for one in sorted([*forms.values(), *beside]))
        raise RerouteError(f"split {split} is there in more than one form ({found}): keep one of them in {folder}")


def _form(file: Path) -> tuple[Path, str, str]:
    named = next((kind for kind, form in (("shard", _SHARD), ("part", _PART)) if form.fullmatch(file.stem)), "other")
    return file.parent, file.suffix, "whole" if "-" not in file.stem else named


def _all_shards(folder: Path, split: str, files: Sequence[Path]) -> None:
    shards = [(found, file) for file in files if (found := _SHARD.fullmatch(file.stem))]
    totals = sorted({int(found["total"]) for found, _ in shards})
    if len(totals) > 1:
        raise RerouteError(
            f"split {split} of {folder} mixes sets of {' and '.join(map(str, totals))} shards ({_listed(files)}): keep "
            "the files of one"
        )
    numbered = shards or [(found, file) for file in files if (found := _PART.fullmatch(file.stem))]
    by_number: dict[int, list[Path]] = {}
    for found, file in numbered:
        by_number.setdefault(int(found["number"]), []).append(file)
    for number, same in by_number.items():
        if len(same) > 1:
            raise RerouteError(f"split {split} of {folder} has shard {number} twice ({_listed(same)}): keep one")
    if not by_number:
        return
    # Parts that do not say how many they are may count from one.
    expected = range(totals[0]) if totals else range(min(1, *by_number), max(by_number) + 1)
    missing = [number for number in expected if number not in by_number]
    beyond = [by_number[number][0] for number in sorted(by_number) if number not in expected]
    if missing:
        names = [_shard_name(numbered[0][1], number) for number in missing[:_NAMED]]
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise RerouteError(
            f"split {split} of {folder} lacks {', '.join(names)}{more}: it has {len(by_number)} of "
            f"{len(expected)} shards, fetch the rest"
        )
    if beyond:
        raise RerouteError(
            f"split {split} of {folder} has shards beyond its {len(expected)} ({_listed(beyond)}): take them away"
        )


def _shard_name(like: Path, number: int) -> str:
    """The file of another shard, called as this one is."""
    split, digits, *rest = like.stem.split("-")
    total = rest[:2] if rest[:1] == ["of"] else []
    return "-".join([split, str(number).zfill(len(digits)), *total]) + like.suffix


def _listed(files: Sequence[Path]) -> str:
    names = [file.name for file in files[:_NAMED]]
    return ", ".join(names) + (", ..." if len(files) > _NAMED else "")
