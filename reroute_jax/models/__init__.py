"""The model families by the name that `config.json` calls them (`model_type`).

Here and in the rooms around, `transformers` is imported by the functions that open a checkpoint: where torch is
installed it brings torch along, 8 of the 12 CPU seconds that every command took to start (transformers 5.24, November
2026).
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from types import MappingProxyType

from huggingface_hub.errors import StrictDataclassError

from reroute_jax.config import ModelConfig, with_generation
from reroute_jax.errors import RerouteError
from reroute_jax.models import llava, qwen2_5_vl, qwen3_vl
from reroute_jax.models.family import Family

FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in (llava, qwen2_5_vl, qwen3_vl)}

# What a value of another type or size causes, here and in transformers.
_UNREADABLE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, StrictDataclassError)


def read_config(config: Mapping, generation: Mapping = MappingProxyType({})) -> ModelConfig:
    """The configuration of a `config.json` and a `generation_config.json` that were parsed to mappings.

    Stop tokens, pad token and repetition penalty come from `generation`, as transformers has it, and the tokens from
    `config` where it has none. What it says of sampling (do_sample, temperature, top_p, top_k) is not followed:
    answers are greedy unless the caller asks otherwise.
    Raises RerouteError for an architecture or a setting that is not implemented, and where nothing names a stop token.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        known = " or ".join(repr(family) for family in FAMILIES)
        raise RerouteError(f"unknown architecture {name!r} in config.json: expected model_type {known}")
    from transformers import AutoConfig

    try:
        hf = AutoConfig.for_model(**deepcopy(config))  # transformers writes into what is nested
        return with_generation(FAMILIES[name].read_config(hf), generation)
    except RerouteError:
        raise
    except _UNREADABLE as problem:
        reason = " ".join(str(problem).split())
        raise RerouteError(f"config.json cannot be read ({reason}): restore it from the original") from problem
