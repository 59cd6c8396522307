"""Shapes in signatures are checked at run time; programs are compiled quickly: tests compile much and run little."""

import gc
import os
import resource
import sys
from importlib.metadata import version

import jaxtyping
import pytest
from jaxtyping import install_import_hook

# CPU seconds of a routed prefill of 8 layers (jax 0.10.2, November 2026): to compile it 10 by default and 5 at level 0;
# with its tracing 7.6 at level 0 and 4.3 when the older emitter, which jax 0.12 lacks, writes the fused loops, too. XLA
# reads the environment when it starts, in subprocesses of tests as well, and stops at a flag it does not know.
# One piece of LLVM code instead of 32 takes a quarter off what is left, and XLA's checks of itself are another tenth.
_QUICK = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
_CHECKS = "hlo-verifier"
if version("jaxlib").startswith("0.10."):
    _QUICK.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), *_QUICK, f"--xla_disable_hlo_passes={_CHECKS}"]
).strip()
# Imports and tracing make millions of objects that stay: going through them again and again took 5 s of every start.
gc.set_threshold(100_000, 20, 50)

install_import_hook("reroute_jax", "beartype.beartype")


def pytest_sessionfinish():
    """Behind it pytest collects all garbage several times: seconds, with what a worker holds by then."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _unverified_programs():
    """Of the library's programs as well, whose own list of passes stands instead of the flag's."""
    from reroute_jax.engine import compilation

    compilation._OPTIONS["cpu"]["xla_disable_hlo_passes"] += f",{_CHECKS}"


@pytest.fixture(scope="module", autouse=True)
def _small_workers():
    """A worker that has grown lets go of its programs between files: each holds megabytes."""
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if peak > 2e9 and "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture
def unchecked_annotations():
    """Lowering ahead of time puts shapes where annotations want arrays."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
