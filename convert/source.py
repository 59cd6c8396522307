"""Opening a checkpoint: a hub id, a Hugging Face folder, or a converted folder. Weights are not read here."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

from reroute_jax.errors import RerouteError

FORMAT = 2
MANIFEST_NAME = "reroute_jax.json"
# What travels with the weights: configurations, tokenizer, image processor, chat template.
COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja")


@dataclass(frozen=True)
class Manifest:
    """What `reroute_jax.json` says.

    `dtype` is None where every tensor kept the one it was stored in; `files` has the bytes of each file of `params/`.
    """

    format: int
    source: str
    dtype: str | None
    tensors: int
    parameters: int
    nbytes: int
    files: dict[str, int]


@dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint folder that exists. `name` is what the user called it; `manifest` is None for a Hugging Face one."""

    name: str
    folder: Path
    config: dict
    manifest: Manifest | None


def open_source(path: str | Path) -> Source:
    """A hub id, a Hugging Face folder or a converted folder. Weights are not read yet; a hub id is downloaded.

    Raises RerouteError if there is no such checkpoint, the hub cannot be reached, or config.json is absent or corrupt.
    """
    name, folder = str(path), Path(path)
    if not folder.is_dir():
        if folder.exists():
            raise RerouteError(f"{name} is a file: expected a checkpoint folder or a hub id such as owner/model")
        folder = _download(name)
    if not (folder / "config.json").is_file():
        raise RerouteError(f"{name} has no config.json: expected a Hugging Face or a converted checkpoint folder")
    return Source(name, folder, _read_json(folder / "config.json"), _read_manifest(folder))


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise RerouteError(f"{file} is not JSON ({error}): restore it from the original checkpoint") from error
    if not isinstance(content, dict):
        raise RerouteError(f"{file} is not a JSON object: restore it from the original checkpoint")
    return content


def _read_manifest(folder: Path) -> Manifest | None:
    file = folder / MANIFEST_NAME
    if not file.is_file():
        return None
    content = _read_json(file)
    if content.get("format") != FORMAT:
        raise RerouteError(f"{file} is of format {content.get('format')!r}, this version reads {FORMAT}: convert again")
    try:
        return Manifest(**content)
    except TypeError as error:
        raise RerouteError(f"{file} is damaged ({error}): convert again") from error


def _download(name: str) -> Path:
    """The local snapshot of a hub repository, from the cache where the hub cannot be reached."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise RerouteError(f"{name} does not exist: expected a checkpoint folder or a hub id such as owner/model")
    patterns = ["*.safetensors", *COMPANIONS]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        raise RerouteError(
            f"{name} is neither a folder here nor a hub repository you can read: correct it, or run `hf auth login`"
        ) from error
    except (OSError, ValueError, huggingface_hub.errors.HTTPError) as error:
        reason = str(error).splitlines()[0]
        raise RerouteError(
            f"{name} is not a folder here and the hub cannot be reached ({reason}): check the network, or give a folder"
        ) from error
