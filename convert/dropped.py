"""Tensors of a checkpoint that become no parameter: packed ones are refused, all others compared."""

from __future__ import annotations

import re
from collections.abc import Sequence

from convert.safetensors import Tensor, equal, read
from convert.source import quantised
from convert.table import ConversionTable
from reroute_jax.errors import RerouteError

_QUANTISED_KEYS = (".qweight", ".qzeros", ".weight_packed", ".absmax")


def refuse_quantised(name: str, tensors: Sequence[Tensor]) -> None:
    """By its tensors alone; what config.json says was seen before. Buffers are I64, or floating point."""
    for tensor in tensors:
        packed = tensor.key.endswith(_QUANTISED_KEYS)
        if packed or tensor.dtype.startswith(("F8", "F4", "F6")) or tensor.dtype in ("I8", "U8"):
            raise RerouteError(quantised(name, f"{tensor.key} is {tensor.dtype}"))


def compare_dropped(name: str, tensors: Sequence[Tensor], table: ConversionTable) -> None:
    """What becomes no parameter must be what the model has without it."""
    named = {table.canonical(tensor.key): tensor for tensor in tensors}
    for key, tensor in named.items():
        for buffer in table.buffers:
            if re.fullmatch(buffer.pattern, key) and not buffer.agrees(read(tensor)):
                raise RerouteError(
                    f"{name}: {tensor.key} differs from what config.json makes of it: the weights are of a model with "
                    "other positions, correct config.json"
                )
    for copy, original in table.copies:
        if copy in named and original in named and not equal(named[copy], named[original]):
            raise RerouteError(f"{name}: {copy} differs from {original}, which config.json says it repeats")
