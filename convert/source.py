"""Opening a checkpoint: a hub id, a Hugging Face folder, or a converted folder. Weights are not read here."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

from convert.safetensors import FOREIGN_SUFFIXES
from reroute_jax.errors import RerouteError

FORMAT = 3
MANIFEST_NAME = "reroute_jax.json"
# What travels with the weights: configurations, tokenizer, image processor, chat template.
COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja")


@dataclass(frozen=True)
class Manifest:
    """What `reroute_jax.json` says.

    `dtype` is None where every tensor kept the one it was stored in, `quantise` None where none is quantised; `files`
    has the bytes of each file of `params/`.
    """

    format: int
    source: str
    dtype: str | None
    quantise: str | None
    tensors: int
    parameters: int
    nbytes: int
    files: dict[str, int]


@dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint folder that exists. `name` is what the user called it; `config` and `generation` are config.json and
    generation_config.json (empty where there is none); `manifest` is None for a Hugging Face one."""

    name: str
    folder: Path
    config: dict
    generation: dict
    manifest: Manifest | None


def open_source(path: str | Path) -> Source:
    """A hub id, a Hugging Face folder or a converted folder. Weights are not read yet; a hub id is downloaded.

    Raises RerouteError if there is no such checkpoint, the hub cannot be reached, config.json is absent or corrupt, or
    the folder holds something else: an adapter, a quantised checkpoint, GGUF.
    """
    name, folder = str(path), Path(path)
    if not folder.is_dir():
        if folder.suffix in FOREIGN_SUFFIXES:
            raise RerouteError(f"{name} is a {folder.suffix} file: give the original Hugging Face checkpoint folder")
        if folder.exists():
            raise RerouteError(f"{name} is a file: expected a checkpoint folder or a hub id such as owner/model")
        folder = _download(name)
    _refuse_adapter(name, folder)
    if not (folder / "config.json").is_file():
        foreign = sorted(file.name for file in folder.iterdir() if file.suffix in FOREIGN_SUFFIXES)
        found = f", but {foreign[0]}" if foreign else ""
        raise RerouteError(
            f"{name} has no config.json{found}: expected a Hugging Face or a converted checkpoint folder"
        )
    config = _read_json(folder / "config.json")
    _refuse_quantised(name, folder, config)
    generation = folder / "generation_config.json"
    return Source(name, folder, config, _read_json(generation) if generation.is_file() else {}, _read_manifest(folder))


def _refuse_adapter(name: str, folder: Path) -> None:
    found = [file for file in ("adapter_config.json", "adapter_model.safetensors") if (folder / file).is_file()]
    if not found:
        return
    base = _read_json(folder / found[0]).get("base_model_name_or_path") if found[0].endswith(".json") else None
    of = f" of {base}" if base else ""
    raise RerouteError(
        f"{name} holds an adapter{of} ({found[0]}): merge it into its base model (merge_and_unload of peft) and give "
        "the merged checkpoint"
    )


def _refuse_quantised(name: str, folder: Path, config: dict) -> None:
    """By what transformers and the quantisers themselves leave in a folder."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        for entry in ("quantization_config", "compression_config"):
            if made := part.get(entry):
                how = made.get("quant_method") if isinstance(made, dict) else None
                raise RerouteError(quantised(name, f"{entry} of config.json: {how or 'of an unnamed method'}"))
    for file in ("quantize_config.json", "quant_config.json", "hf_quant_config.json"):
        if (folder / file).is_file():
            raise RerouteError(quantised(name, file))


def quantised(name: str, sign: str) -> str:
    """The refusal of a quantised checkpoint."""
    return f"{name} is quantised ({sign}): give the unquantised checkpoint, in float32, bfloat16 or float16"


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
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
