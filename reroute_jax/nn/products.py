"""Products with kernels as PyTorch stores them, `[out, in]`, in the form that the target of the lowering runs best.

For a single fp32 row XLA's CPU backend streams such a kernel at 25 GB/s, and one stored `[in, out]` at 14 (hidden 1024,
2 cores, jax 0.12.0.1, November 2026).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from reroute_jax.nn.precision import precision

# Rows of fp32 up to which the product is faster with the kernel on the left.
FEW_ROWS = 64


# Inlined: traced once for each shape, and no call in the program.
@partial(jax.jit, static_argnames="dtype", inline=True)
def matmul(x: Float[Array, "*rows I"], kernel: Float[Array, "O I"], dtype=None) -> Float[Array, "*rows O"]:
    """`x @ kernel.T`, accumulated in `dtype` (None: that of x).

    As one plain matrix product: XLA's CPU backend runs it, and above all its gradient, 2.5 times as fast as a
    contraction with several row dimensions (jax 0.10.2, November 2026).
    """
    rows, plain = x.reshape(-1, x.shape[-1]), partial(_plain, dtype=dtype)
    if rows.dtype == jnp.float32 and len(rows) > FEW_ROWS:
        product = plain(rows, kernel)
    else:
        product = jax.lax.platform_dependent(rows, kernel, cpu=partial(_on_cpu, dtype=dtype), default=plain)
    return product.reshape(*x.shape[:-1], kernel.shape[0])


def barrier_on_cpu(arrays):
    """`jax.lax.optimization_barrier` in a program for the CPU; nothing in others."""
    return jax.lax.platform_dependent(arrays, cpu=jax.lax.optimization_barrier, default=lambda same: same)


def _plain(rows: Float[Array, "R I"], kernel: Float[Array, "O I"], dtype) -> Float[Array, "R O"]:
    return jnp.matmul(rows, kernel.T, preferred_element_type=dtype, precision=precision(rows, kernel))


def _on_cpu(rows: Float[Array, "R I"], kernel: Float[Array, "O I"], dtype) -> Float[Array, "R O"]:
    if rows.dtype == jnp.float32:
        return _kernel_first(kernel, rows.T, dtype)
    count = rows.shape[0]
    # jax 0.12 uses the processor's bf16 units for two plain operands and two rows or more: 6 ms for one row of 4096 by
    # 11008, not 53, and 90 for 640, not 287 (2 cores, jax 0.12.0.1, November 2026).
    at_least_two = jnp.pad(rows, ((0, max(0, 2 - count)), (0, 0)))
    columns = with_layout_constraint(at_least_two.T, Layout((0, 1)))
    return _kernel_first(kernel, columns, dtype)[:count]


def _kernel_first(kernel: Float[Array, "O I"], columns: Float[Array, "I R"], dtype) -> Float[Array, "R O"]:
    product = jnp.matmul(kernel, columns, preferred_element_type=dtype, precision=precision(kernel, columns))
    # Without the barrier XLA turns this back into the plain product.
    return jax.lax.optimization_barrier(product).T
