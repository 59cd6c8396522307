"""A checkpoint as a Model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jax.sharding import Mesh

import reroute_jax
from convert.checkpoint import load_params
from convert.embedded import EMBEDDED, locate
from convert.families import table_of
from convert.opening import open_checkpoint
from reroute_jax.config import ModelConfig
from reroute_jax.engine.model import Model
from reroute_jax.errors import RerouteError, one_of
from reroute_jax.mesh import open_mesh
from reroute_jax.models import FAMILIES
from reroute_jax.nn.cache import KINDS
from reroute_jax.nn.mrope import COMPATS
from reroute_jax.nn.params import named_parameters, with_parameters
from reroute_jax.nn.quantised import TILES, with_quantised
from reroute_jax.nn.sharding import on_mesh
from reroute_jax.types import FLOATS


def load(
    path: str | Path,
    dtype: str | None = None,
    mrope_compat: str | None = None,
    vicuna_system: bool = False,
    pixel_limits: tuple[int, int] | None = None,
    mesh: str | Mesh | None = None,
    quantise: str | None = None,
    kv_cache: str | None = None,
) -> Model:
    """Load a hub id, a Hugging Face folder (converted on the fly), a converted folder, or an embedded model.

    dtype: "float32", "bfloat16" or "float16"; None keeps the stored one, but float32 for an embedded model.
    mrope_compat: "hf-5.4" for the rotary positions that transformers 5.4 gave to Qwen2.5-VL's images, to compare with
    numbers made with it (`mrope.py`). vicuna_system: open LLaVA's prompts with the system sentence of its own
    evaluation, which the checkpoint's chat template leaves out. pixel_limits: fewest and most pixels of an image of
    Qwen2.5-VL, instead of those of the checkpoint's image processor. mesh: devices to split the model over,
    "data=2,model=4" of this process, or a mesh with these axes; None takes the first device. Each device reads its own
    part of the checkpoint. quantise: "int8" or "int4" for the decoder's weights, which `dtype` then is the dtype of
    the scales and of everything else of; None keeps what is stored. kv_cache: "int8" for the keys and values that
    tokens of an answer read; None keeps them in `dtype`.
    Raises RerouteError for a checkpoint that is absent, damaged, of an unknown architecture, or does not fit its
    config.json, and for a mesh that the model does not fit on.
    """
    if dtype is not None:
        one_of("dtype", dtype, tuple(FLOATS))
    if path in EMBEDDED:
        path, dtype = locate(path), dtype or "float32"
    source, config = open_checkpoint(path)
    if mrope_compat is not None:
        one_of("mrope_compat", mrope_compat, COMPATS)
        config = _with_option(config, "mrope_compat", mrope_compat)
    if vicuna_system:
        config = _with_option(config, "vicuna_system", True)
    if pixel_limits is not None:
        config = with_pixel_limits(config, pixel_limits)
    if kv_cache is not None:
        config = with_kv_cache(config, kv_cache)
    empty = reroute_jax.abstract_params(config)
    if quantise is not None:
        one_of("quantise", quantise, tuple(TILES))
    stored = None if source.manifest is None else source.manifest.quantise
    if quantise and stored and quantise != stored:
        raise RerouteError(f"{source.name} holds {stored} weights, not {quantise}: leave it out, or convert again")
    if quantise or stored:
        empty = with_quantised(empty, quantise or stored)
    if mesh is not None:
        empty = on_mesh(empty, open_mesh(mesh, config.decoder))
    params = load_params(source, named_parameters(empty), table_of(config), dtype)
    return Model(config, with_parameters(empty, params), source.folder)


def with_pixel_limits(config: ModelConfig, limits: tuple[int, int]) -> ModelConfig:
    """Raises RerouteError for limits that no image can keep, and for a family without them."""
    _check_option(config, "pixel_limits")
    smallest = (config.vision.patch_size * config.vision.merge) ** 2
    whole = isinstance(limits, tuple | list) and [type(edge) for edge in limits] == [int, int]
    if not whole or not smallest <= limits[1] >= limits[0] > 0:
        raise RerouteError(
            f"pixel_limits are {limits!r}, expected two whole numbers (fewest, most), the second at least {smallest}"
        )
    return replace(config, pixel_limits=tuple(limits))


def with_kv_cache(config: ModelConfig, kind: str) -> ModelConfig:
    """Raises RerouteError for a kind that is not of `cache.KINDS`."""
    one_of("kv_cache", kind, KINDS)
    return replace(config, decoder=replace(config.decoder, kv_cache=kind))


def _with_option(config: ModelConfig, name: str, value: object) -> ModelConfig:
    _check_option(config, name)
    return replace(config, **{name: value})


def _check_option(config: ModelConfig, name: str) -> None:
    """Raises RerouteError where the model's family has no such option."""
    if name not in FAMILIES[config.family].options:
        users = " and ".join(family.name for family in FAMILIES.values() if name in family.options)
        raise RerouteError(f"{name} is for {users}, this model is {config.family}: leave it out")
