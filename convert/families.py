"""The architectures that can be converted: for each its table, and the parameters its model wants."""

from __future__ import annotations

from importlib import import_module

import jax

import reroute_jax
from convert.table import ConversionTable
from reroute_jax.config import ModelConfig
from reroute_jax.nn.params import named_parameters


def table_of(config: ModelConfig) -> ConversionTable:
    """The conversion rules for a model of this configuration: `table` of the module here that its family is named by.

    By name and not in the family's own entry, because the library must not know of `convert`.
    """
    return import_module(f"convert.{config.family}").table(config)


def abstract_params(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter of the model as dotted path -> shape; nothing is allocated."""
    return named_parameters(reroute_jax.abstract_params(config))
