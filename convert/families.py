"""The architectures that can be converted: for each its table, and the parameters its model wants."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from convert import llava, qwen2_5_vl
from convert.table import ConversionTable
from reroute_jax.config import ModelConfig
from reroute_jax.models import FAMILIES
from reroute_jax.nn.params import named_parameters

_TABLES = {"llava": llava.table, "qwen2_5_vl": qwen2_5_vl.table}


def table_of(config: ModelConfig) -> ConversionTable:
    """The conversion rules for a model of this configuration."""
    return _TABLES[config.family](config)


def abstract_params(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter of the model as dotted path -> shape; nothing is allocated."""
    build = FAMILIES[config.family].model
    return named_parameters(nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0), dtype=jnp.float32)))
