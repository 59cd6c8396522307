"""Compiling for the platform that a program will run on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, wraps
from pathlib import Path
from typing import Any

import jax

from reroute_jax.nn.sharding import mesh_at, place_of

# XLA's CPU backend multiplies bf16 by way of fp32 copies of the weights, in most forms of a product. Its default
# scheduler makes all copies before the first product, and invariant code motion moves those of a decode step out of the
# loop: 26 GB for a 7B model instead of 0.5. The memory-optimised scheduler is also the faster one in fp32: 640 tokens,
# hidden 1024, 16 layers in 1.32 s, not 1.53 (2 cores, jax 0.10.2, November 2026). Loops over less than about 1 GB
# become one piece of code for one thread: 65 ms a token of the same model, not 40 (jax 0.12.0.1, November 2026).
_OPTIONS = {
    "cpu": {
        "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
        "xla_disable_hlo_passes": "while-loop-invariant-code-motion,small-while-loop-hoisting",
    }
}


def compiled(**jit_options) -> Callable[[Callable], Callable]:
    """`jax.jit` with the options of the platform that the arguments lie on, traced for their mesh.

    The wrapped function offers `jitted(platform)`, the function that `jax.jit` made for it ("cpu", "gpu", "tpu"; None:
    that of the default device), for those who lower and compile ahead of time; `compile(...)`, which compiles for
    arguments like these, arrays or shapes, and returns the program and its results' shapes, with their places if one of
    the arguments has one: for arguments that lie elsewhere or nowhere JAX compiles again; and `ahead(...)`, the same
    for later calls, which returns the shapes alone.
    """

    def decorate(function: Callable) -> Callable:
        @cache
        def jitted(platform: str | None = None) -> Callable:
            if platform is None:
                return jitted(jax.default_backend())
            return jax.jit(function, compiler_options=_OPTIONS.get(platform), **jit_options)

        @wraps(function)
        def call(*args, **kwargs):
            place = place_of((args, kwargs))
            with _on_mesh_at(place):
                return jitted(_platform(place))(*args, **kwargs)

        def compile_for(*args, **kwargs) -> tuple[jax.stages.Compiled, Any]:
            place = place_of((args, kwargs))
            with _on_mesh_at(place):
                traced = jitted(_platform(place)).trace(*args, **kwargs)
                program = traced.lower().compile()
            shapes = traced.out_info
            return program, shapes if place is None else jax.tree.map(_placed, shapes, program.output_shardings)

        call.jitted, call.compile, call.ahead = jitted, compile_for, lambda *args, **kw: compile_for(*args, **kw)[1]
        return call

    return decorate


def on_mesh_of(arguments):
    """The context that a program of these arguments is traced in."""
    return _on_mesh_at(place_of(arguments))


def _on_mesh_at(place: jax.sharding.Sharding | None):
    mesh = mesh_at(place)
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def _platform(place: jax.sharding.Sharding | None) -> str | None:
    return None if place is None else next(iter(place.device_set)).platform


def _placed(shape: jax.ShapeDtypeStruct, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)


def keep_programs(folder: Path) -> None:
    """Store compiled programs in `folder`, and take from it those that an earlier process stored: for this process, and
    for all of JAX in it. Programs that compile in under half a second are compiled again."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@contextmanager
def compilations() -> Iterator[list[str]]:
    """What was compiled inside: a line each, as the programs log it when they are traced."""
    found: list[str] = []
    log, handler = logging.getLogger("reroute_jax"), logging.Handler(logging.INFO)
    handler.emit = lambda record: found.append(record.getMessage())
    handler.addFilter(lambda record: record.getMessage().startswith("compiling"))
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        yield found
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
