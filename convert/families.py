"""The architectures that can be converted: for each its table, and the parameters its model wants."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from convert import llava
from convert.table import Table
from reroute_jax.config import ModelConfig
from reroute_jax.models.llava import Llava
from reroute_jax.params import named_parameters

_TABLES = {"llava": llava.table}
_MODELS = {"llava": Llava}


def table_of(config: ModelConfig) -> Table:
    """The conversion rules for a model of this configuration."""
    return _TABLES[config.family](config)


def abstract_params(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter of the model as dotted path -> shape; nothing is allocated."""
    model = nnx.eval_shape(lambda: _MODELS[config.family](config, rngs=nnx.Rngs(0), dtype=jnp.float32))
    return named_parameters(model)
