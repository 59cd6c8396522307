"""`python -m benchmarks.gpu --peak-tflops 989 --out runs/gpu`

All that is to be measured on a GPU, in one command: the speed of both 7B backbones with random weights against
transformers' PyTorch model, attention by XLA and by cuDNN, and where the time goes. Each step is a process of its own
with its own log. A run that was interrupted goes on with the step that had not finished. `--rehearsal` runs the same
steps with tiny models on the CPU: it shows that they work, and measures nothing.

A GPU of 80 GB is enough. PyTorch must be built for it too.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evals.harness.run_folder import write_json
from reroute_jax.commandline.parsing import OUTPUT, RUN, Parser, exit_code, positive_number
from reroute_jax.errors import RerouteError

# JAX takes its share of the memory at the start and never gives it back; PyTorch lives on the rest. At batch 32 in bf16
# JAX needs up to 38 GB: weights (14 GB LLaVA, 17 Qwen), cache (11, 1), inputs of all runs (1, 8), and what a program
# works in (3, 13: the tower's attention over whole images), by `memory_analysis` on the CPU. PyTorch needs up to 28:
# the same weights and cache, and some 3 for activations. Of the 85 GB of an H100 this gives them 47 and 38; JAX's
# default, three quarters, leaves PyTorch 21.
SHARED_GPU = {"XLA_CLIENT_MEM_FRACTION": "0.55"}
# The profiler takes all kernels of a CUDA graph for one operation.
NO_GRAPHS = {"XLA_FLAGS": "--xla_gpu_enable_command_buffer="}


@dataclass(frozen=True)
class Scale:
    """Arguments of the steps. models: random ones, each with what its prompts need; the others: of each command.
    environment: of all steps."""

    models: Mapping[str, tuple[str, ...]]
    dtype: str
    bench: tuple[str, ...]
    attention: tuple[str, ...]
    profile: tuple[str, ...]
    environment: Mapping[str, str]


FULL = Scale(
    models={"llava-1.5-7b": (), "qwen2.5-vl-7b": ()},
    dtype="bfloat16",
    bench=("--batch-sizes", "1", "8", "32", "--compile-threads", "8"),
    attention=("--shape", "7b"),
    profile=("--batch-size", "8"),
    environment={},
)
REHEARSAL = Scale(
    models={"llava-tiny": ("--text", "7"), "qwen-tiny": ("--text", "7", "--grid", "4", "4")},
    dtype="float32",
    # Four layers cannot meet the budgets of the papers.
    bench=(
        *("--batch-sizes", "1", "2", "--repetitions", "2", "--new-tokens", "3"),
        *("--first-decision", "1", "--budgets", "3/8"),
    ),
    attention=("--shape", "rehearsal", "--batch-sizes", "1", "2", "--repetitions", "2"),
    profile=("--batch-size", "2", "--repetitions", "2", "--first-decision", "1", "--budget", "1/2"),
    environment={"JAX_PLATFORMS": "cpu"},
)


@dataclass(frozen=True)
class Step:
    """`python -m COMMAND --out OUT`. environment: set for it beside this process's own."""

    name: str
    command: tuple[str, ...]
    out: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def arguments(self) -> tuple[str, ...]:
        """Behind the interpreter."""
        return "-m", *self.command, "--out", str(self.out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 after one line where there is no GPU, or where a step failed."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: measure(args), args.debug)


def measure(args: argparse.Namespace) -> None:
    if not args.rehearsal and (found := backend()) != "gpu":
        raise RerouteError(
            f"JAX finds no GPU, its backend is {found}: install the jax of your GPU, or give --rehearsal to run the "
            "same steps with tiny models on the CPU"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    run_steps(steps(REHEARSAL if args.rehearsal else FULL, args.peak_tflops, args.out), args.out, run_logged)
    print(f"results: {args.out}")


def backend() -> str:
    """JAX's, asked for by another process, because the one that asks keeps the GPU's memory."""
    ask = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    answer = subprocess.run(ask, capture_output=True, text=True)
    if answer.returncode:
        raise RerouteError(f"JAX does not start: {answer.stderr.strip().splitlines()[-1]}")
    return answer.stdout.split()[-1]


def steps(scale: Scale, peak_tflops: float, out: Path) -> list[Step]:
    dtype = ("--dtype", scale.dtype)
    against = ("--peer", "torch", "--peak-tflops", f"{peak_tflops:g}")
    routes = ("--method", "pdrop", "--compare")
    models = [(name, ("--random", name, *dtype, *sizes)) for name, sizes in scale.models.items()]
    return [
        *(
            Step(
                f"bench-{name}",
                ("evals.bench", *model, *scale.bench, *against),
                out / f"bench-{name}",
                {**scale.environment, **SHARED_GPU},
            )
            for name, model in models
        ),
        Step("attention", ("benchmarks.attention", *dtype, *scale.attention), out / "attention", {**scale.environment}),
        *(
            Step(
                f"profile-{name}",
                ("evals.profile", *model, *routes, *scale.profile),
                out / f"profile-{name}.json",
                {**scale.environment, **NO_GRAPHS},
            )
            for name, model in models
        ),
    ]


def run_steps(todo: Sequence[Step], folder: Path, run: Callable[[Step, Path], int]) -> None:
    """Run what `folder` does not say is finished. run: a step with its log file, to its exit status.

    Raises RerouteError for a step that fails, naming its log, and for one that was finished with other arguments.
    """
    for number, step in enumerate(todo, 1):
        place, mark = f"[{number}/{len(todo)}] {step.name}", folder / f"{step.name}.finished"
        if finished(mark, step):
            print(f"{place}: finished before")
            continue
        print(f"{place}: {shlex.join(['python', *step.arguments])}", flush=True)
        log, start = folder / f"{step.name}.log", time.perf_counter()
        status = run(step, log)
        if status:
            raise RerouteError(
                f"step {step.name} ended with status {status}: see {log}; the same command goes on with this step"
            )
        seconds = time.perf_counter() - start
        write_json(mark, {"command": step.command, "seconds": seconds})
        print(f"{place}: {seconds:.0f} s")


def finished(mark: Path, step: Step) -> bool:
    """Raises RerouteError where `mark` is of the same step with other arguments."""
    if not mark.exists():
        return False
    made = json.loads(mark.read_text())["command"]
    if made != list(step.command):
        raise RerouteError(
            f"{mark} is of another command, {shlex.join(made)}, expected {shlex.join(step.command)}: give another --out"
        )
    return True


def run_logged(step: Step, log: Path) -> int:
    """Run a step in this interpreter, all that it prints in `log`."""
    environment = {**os.environ, **step.environment}
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run([sys.executable, *step.arguments], stdout=file, stderr=file, env=environment)
    return done.returncode


def _parser() -> Parser:
    examples = (
        "--peak-tflops 989 --out runs/gpu",
        "--peak-tflops 312 --out runs/a100",
        "--peak-tflops 1 --out runs/rehearsal --rehearsal",
    )
    parser = Parser("benchmarks.gpu", __doc__, examples)
    run, output = parser.group(RUN), parser.group(OUTPUT)
    run.add_argument(
        "--peak-tflops", type=positive_number, required=True, metavar="X", help="of the GPU's datasheet, bf16, dense"
    )
    run.add_argument("--rehearsal", action="store_true", help="the same steps with tiny models, on the CPU")
    output.add_argument("--out", type=Path, required=True, help="folder of results, logs, and what is finished")
    return parser


if __name__ == "__main__":
    sys.exit(main())
