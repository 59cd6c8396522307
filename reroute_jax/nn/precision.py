"""How exactly products are taken: by the dtype of their operands, so that it holds in anybody's program."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def precision(*operands: jax.Array) -> jax.lax.Precision | None:
    """HIGHEST where an operand is fp32, which an accelerator would otherwise multiply as TF32 (GPU) or in one bf16 pass
    (TPU); else the backend's own, which is exact for 16-bit operands and fp32 sums."""
    wide = any(operand.dtype == jnp.float32 for operand in operands)
    return jax.lax.Precision.HIGHEST if wide else None
