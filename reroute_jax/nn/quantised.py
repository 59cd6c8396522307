"""The decoder's weights in int8 or int4, weight-only, by qwix: symmetric, with scales in the dtype of the model.

Numbers of a weight's last axis share a scale, in int4 32 of them. Products see floating point again, which XLA makes of
them inside the product where its backend can.
"""

from __future__ import annotations

import math
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from reroute_jax.errors import RerouteError
from reroute_jax.nn.params import mapped

# How many numbers of the last axis share a scale at most; None: all.
TILES = {"int8": None, "int4": 32}


@partial(jax.jit, static_argnames="kind")
def quantised(weight: Array, kind: str) -> Any:
    """A `qwix.QArray` of the weight. kind: of TILES. Raises RerouteError without qwix."""
    last, tile = weight.ndim - 1, TILES[kind]
    tiles = None if tile is None else {last: math.gcd(tile, weight.shape[last])}
    return _qwix().quantize(weight, kind, channelwise_axes=range(last), tiled_axes=tiles)


def plain(weight: Any) -> Array:
    """The weight as floating-point numbers, quantised or not."""
    return _qwix().dequantize(weight) if hasattr(weight, "qvalue") else weight


def rows_of(table: Any, ids: Array) -> Array:
    """Rows of a table, quantised or not, as floating-point numbers."""
    return plain(jax.tree.map(lambda part: part[ids], table))


def with_quantised(module: nnx.Module, kind: str) -> nnx.Module:
    """A module of shapes, with those of the quantised weights: all products' and the embeddings' of the decoder."""

    def shapes(path: tuple, leaf: nnx.Variable) -> nnx.Variable:
        if path[0] != "decoder" or path[-1] not in ("kernel", "table"):
            return leaf
        return leaf.replace(jax.eval_shape(partial(quantised, kind=kind), leaf.get_value()))

    return mapped(module, shapes)


def _qwix() -> ModuleType:
    try:
        return import_module("qwix")
    except ImportError as error:
        raise RerouteError("int8 and int4 weights need qwix: pip install 'reroute-jax[quantise]'") from error
