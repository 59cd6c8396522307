"""The numbers of a tensor: finite, and in the dtype that is asked for."""

from __future__ import annotations

import numpy as np

from reroute_jax.errors import RerouteError
from reroute_jax.types import FLOATS


def cast(name: str, value: np.ndarray, dtype: str) -> np.ndarray:
    """`value` in `dtype`, one of `FLOATS`. Raises RerouteError, naming the tensor, where float16 does not hold it."""
    if dtype != "float16":
        return value.astype(FLOATS[dtype], copy=False)
    with np.errstate(over="ignore"):
        value = value.astype(np.float16, copy=False)
    if not finite(value):
        raise RerouteError(not_finite(name, dtype))
    return value


def finite(value: np.ndarray) -> bool:
    """By the bits, because numpy has no fast test for bfloat16: NaN and infinity have all bits of the exponent."""
    size = value.dtype.itemsize
    exponent = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}[value.dtype.name]
    bits = value.reshape(-1).view(f"u{size}")
    return all(int((bits[first : first + 2**20] & exponent).max()) != exponent for first in range(0, len(bits), 2**20))


def not_finite(name: str, dtype: str | None) -> str:
    """What is wrong with a tensor that is not finite, cast to `dtype` or (None) as stored."""
    if dtype == "float16":
        return f"{name} has values beyond float16's 65504: use bfloat16 or float32"
    return f"{name} holds NaN or infinity: the checkpoint is damaged, download it again or save it anew"
