"""Text files that somebody else may have written: what is wrong with one is said in one line, with its place."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reroute_jax.errors import RerouteError

_MARKS = {codecs.BOM_UTF8: "UTF-8", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


def json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON lines file with the numbers of their lines, from 1 on; empty lines are passed over.

    Raises RerouteError naming file and line for what is not UTF-8 without a byte order mark, not JSON, no object, or
    holds half of a surrogate pair, which is no character and cannot be tokenised.
    """
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, json_object(line, f"line {number} of {file}", surrogates=False)


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises RerouteError naming the file for anything else."""
    return json_object(file.read_bytes(), str(file))


def json_object(content: bytes, where: str, surrogates: bool = True) -> dict[str, Any]:
    """The object that bytes are the JSON of. surrogates: whether texts may hold one half of a pair, as answers may.

    Raises RerouteError that begins with `where` for anything else.
    """
    mark = next((mark for mark in _MARKS if content.startswith(mark)), None)
    if mark is not None:
        raise RerouteError(
            f"{where} begins with the byte order mark of {_MARKS[mark]}: expected JSON in UTF-8 without one"
        )
    if b"\0" in content:
        raise RerouteError(f"{where} holds NUL bytes: expected JSON in UTF-8, not UTF-16 and not a damaged file")
    try:
        found = json.loads(content.decode())
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise RerouteError(f"{where} is not UTF-8 (byte {byte:#04x} at {error.start}): save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise RerouteError(f"{where} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise RerouteError(f"{where} is no object: expected JSON that begins with {{")
    if not surrogates and b"\\u" in content and _has_surrogate(found):
        raise RerouteError(f"{where} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return found


def _has_surrogate(found: dict[str, Any]) -> bool:
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
