"""Compiling for the backend at hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path

import jax

# XLA's CPU backend multiplies bf16 by way of fp32 copies of the weights, in most forms of a product. Its default
# scheduler makes all copies before the first product, and invariant code motion moves those of a decode step out of the
# loop: 26 GB for a 7B model instead of 0.5. The memory-optimised scheduler is also the faster one in fp32: 640 tokens,
# hidden 1024, 16 layers in 1.32 s, not 1.53 (2 cores, jax 0.10.2, November 2026). Loops over less than about 1 GB
# become one piece of code for one thread: 65 ms a token of the same model, not 40 (jax 0.12.0.1, November 2026).
_CPU_OPTIONS = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion,small-while-loop-hoisting",
}


def compiled(**jit_options) -> Callable[[Callable], Callable]:
    """`jax.jit` with options for the default backend, which is only asked for at the first call.

    The wrapped function offers `jitted()`, the function that `jax.jit` made.
    """

    def decorate(function: Callable) -> Callable:
        @cache
        def jitted() -> Callable:
            options = _CPU_OPTIONS if jax.default_backend() == "cpu" else None
            return jax.jit(function, compiler_options=options, **jit_options)

        @wraps(function)
        def call(*args, **kwargs):
            return jitted()(*args, **kwargs)

        call.jitted = jitted
        return call

    return decorate


def keep_programs(folder: Path) -> None:
    """Store compiled programs in `folder`, and take from it those that an earlier process stored: for this process, and
    for all of JAX in it. Programs that compile in under half a second are compiled again."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
