"""A mesh of devices that a model is loaded on: `data=2,model=4`, or a `jax.sharding.Mesh` with these axes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from reroute_jax.config import DecoderConfig
from reroute_jax.errors import RerouteError
from reroute_jax.nn.sharding import AXES, DATA

MODEL = "model"


def mesh_sizes(text: str) -> dict[str, int]:
    """Of both axes, 1 where one is left out. Raises RerouteError for anything but `data=N,model=M` and its parts."""
    parts = [re.fullmatch(rf"({DATA}|{MODEL})=([1-9]\d{{0,5}})", part.strip()) for part in text.split(",")]
    given = dict(part.groups() for part in parts if part)
    if None in parts or len(given) != len(parts):
        raise RerouteError(f"the mesh {text!r} is not understood, expected such as data=2,model=4, model=8 or data=8")
    return {axis: int(given.get(axis, 1)) for axis in (DATA, MODEL)}


def open_mesh(given: str | Mesh, decoder: DecoderConfig) -> Mesh:
    """The mesh with the axes of `nn.sharding`. given: sizes of its axes, taken from the first devices of this process,
    or a mesh of such axes.

    Raises RerouteError for sizes or axes that mean nothing, more devices than there are, and a `model` axis that does
    not divide the decoder's heads and MLP, or that its KV heads neither fill nor share evenly.
    """
    plain = plain_mesh(given, jax.local_devices()) if isinstance(given, str) else given
    if not set(plain.axis_names) <= {DATA, MODEL}:
        raise RerouteError(f"a mesh with the axes {list(plain.axis_names)}, expected {DATA!r} and {MODEL!r}")
    data, model = (plain.shape.get(axis, 1) for axis in (DATA, MODEL))
    check_split(decoder, model)
    devices = plain.devices if plain.axis_names[:1] == (DATA,) else np.moveaxis(plain.devices, 0, -1)
    return arranged(devices.reshape(data, model), decoder.num_kv_heads)


def arranged(devices: np.ndarray, kv_heads: int) -> Mesh:
    """The mesh with the axes of `nn.sharding`. devices: [data, model]."""
    data, model = devices.shape
    kv = math.gcd(kv_heads, model)
    return Mesh(devices.reshape(data, kv, model // kv), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def plain_mesh(text: str, devices: Sequence[jax.Device]) -> Mesh:
    """Of the first devices. Raises RerouteError where there are not enough."""
    sizes = mesh_sizes(text)
    needed = math.prod(sizes.values())
    if needed > len(devices):
        raise RerouteError(
            f"the mesh {text} takes {needed} devices, there are {len(devices)} ({devices[0].platform}): make it smaller"
        )
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), devices=devices[:needed], axis_types=(AxisType.Auto,) * len(sizes)
    )


def check_split(decoder: DecoderConfig, model: int) -> None:
    """Raises RerouteError for a `model` axis that does not divide the decoder's heads and MLP, or that its KV heads
    neither fill nor share evenly."""
    for name, size in (("heads", decoder.num_heads), ("MLP width", decoder.mlp_dim)):
        if size % model:
            raise RerouteError(f"{MODEL}={model} does not divide the decoder's {name} of {size}: give a size that does")
    heads = decoder.num_kv_heads
    if heads % model and model % heads:
        raise RerouteError(
            f"{MODEL}={model} and the decoder's {heads} KV heads: expected a divisor or a multiple of them"
        )
