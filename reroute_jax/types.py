"""Types and dtypes that every room uses."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from jaxtyping import Array

AnyArray = Array | np.ndarray  # made on the host, traced on the device
Grid = tuple[int, int]  # (rows, columns) of visual tokens
Size = tuple[int, int]  # (width, height) in pixels

# Of parameters, activations and caches, by the names that users give.
FLOATS = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
