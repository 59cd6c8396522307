"""The model families by the name that `config.json` calls them (`model_type`)."""

from __future__ import annotations

from collections.abc import Mapping

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from reroute_jax.config import ModelConfig
from reroute_jax.errors import RerouteError
from reroute_jax.models import llava, qwen2_5_vl
from reroute_jax.models.family import Family

FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in (llava, qwen2_5_vl)}


def read_config(config: Mapping) -> ModelConfig:
    """The configuration of a `config.json` that was parsed to a mapping.

    Raises RerouteError for an architecture or a setting that is not implemented.
    """
    name = config.get("model_type")
    if name not in FAMILIES:
        known = " or ".join(repr(family) for family in FAMILIES)
        raise RerouteError(f"unknown architecture {name!r} in config.json: expected model_type {known}")
    try:
        hf = AutoConfig.for_model(**config)
    except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError) as problem:
        reason = " ".join(str(problem).split())
        raise RerouteError(f"config.json cannot be read ({reason}): restore it from the original") from problem
    return FAMILIES[name].read_config(hf)
