"""`python -m benchmarks.aot --platform tpu --topology v5e:2x2 --random llava-1.5-7b --methods pdrop --budgets 64 192`

Compiles the programs of random models for one chip of an accelerator that this machine does not have, or for a mesh of
them (`--mesh model=8 --topology v5e:2x4`), and prints what the compiler says of them: its own time, and arguments,
temporaries, FLOPs, bytes and collectives of each chip. Shapes stand in for weights. For a TPU it needs PyPI's `libtpu`
in the version that `pip install jax[tpu]` takes. Programs that the results hold already are not compiled again, so a
run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Without it libtpu looks for a TPU's own machine and its metadata server.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
from jax.experimental import topologies
from tqdm import tqdm

from benchmarks.lines import line, read
from evals.speed.checkpoint_shapes import SHAPES
from evals.speed.collectives import collectives
from evals.speed.programs import trace_programs
from evals.speed.subjects import open_subject, sample
from reroute_jax.commandline.loading import add_mesh_argument
from reroute_jax.commandline.parsing import DATA, OUTPUT, ROUTE, RUN, Parser, exit_code, positive
from reroute_jax.errors import RerouteError
from reroute_jax.mesh import plain_mesh
from reroute_jax.routing.methods import TIERS
from reroute_jax.routing.stages import ACTIONS
from reroute_jax.types import FLOATS

PROGRAMS = ("encode", "prefill", "decode")
METHODS = ("none", "fastv", "pdrop", "nuwa")


@dataclass(frozen=True)
class Wanted:
    """One program to compile. budget, action: None for the method "none". mesh: None for one chip."""

    model: str
    dtype: str
    device: str
    jax: str
    text: int
    batch: int
    method: str
    budget: int | None
    action: str | None
    program: str
    mesh: str | None

    @property
    def route(self) -> tuple:
        return self.model, self.batch, self.method, self.budget, self.action


@dataclass(frozen=True)
class ProgramCost:
    """Bytes, FLOPs and collectives are a chip's. compile_seconds: from the lowered text on; compile_cpu_seconds: of all
    threads, which depends less on what else runs. operations, sorts, scatters: in the lowered text. needs: what the
    compiler says of a program that a chip's memory does not hold, of which it tells nothing else; None of any other."""

    trace_seconds: float
    compile_seconds: float
    compile_cpu_seconds: float
    operations: int
    sorts: int
    scatters: int
    needs: str | None
    argument_bytes: int | None = None
    temporary_bytes: int | None = None
    flops: float | None = None  # of a run, by the compiler
    moved_bytes: float | None = None
    collectives: dict[str, int] | None = None  # how many of each kind
    told: int | None = None  # numbers that they give


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 after one line on bad input."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: compare(args, list(sys.argv[1:] if argv is None else argv)), args.debug)


def compare(args: argparse.Namespace, arguments: Sequence[str]) -> None:
    # The arrays that programs are traced with live here, whatever the programs are for.
    jax.config.update("jax_platforms", "cpu")
    chips = topology(args.platform, args.topology)
    device = chips[0]
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / f"aot_{args.platform}.jsonl"
    known = read(results, Wanted, ProgramCost)
    asked = list(wanted(args, device.device_kind))
    todo = [one for one in asked if one not in known]
    with tqdm(total=len(todo), desc="compiling", unit="program") as bar, results.open("a") as file:
        for route in dict.fromkeys(one.route for one in todo):
            of_route = [one for one in todo if one.route == route]
            for one, account in accounts(of_route, chips):
                known[one] = account
                file.write(line(one, account))
                file.flush()
                bar.update()
    command = shlex.join(["python", "-m", "benchmarks.aot", *arguments])
    text = f"`{command}`\n\n{table({one: known[one] for one in asked})}\n"
    (args.out / f"aot_{args.platform}.md").write_text(text)
    print(text)


def topology(platform: str, name: str) -> Sequence[jax.Device]:
    """Its chips. Raises RerouteError where this machine's compiler does not know it."""
    try:
        return topologies.get_topology_desc(platform=platform, topology_name=name).devices
    except (RuntimeError, ValueError, NotImplementedError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise RerouteError(
            f"no compiler for the topology {name!r} of {platform!r} here ({reason}): for a TPU, install libtpu in "
            "the version that jax[tpu] asks for, and name a topology such as v5e:2x2"
        ) from problem


def wanted(args: argparse.Namespace, device: str) -> Iterator[Wanted]:
    """Everything that the arguments name; a tower once for each merge."""
    for model in args.random:
        for batch in args.batch_sizes:
            towers = set()
            for method in args.methods:
                routes = [(None, None)]
                if method != "none":
                    routes = [(budget, action) for budget in args.budgets for action in args.actions]
                for budget, action in routes:
                    tower = budget if method == "nuwa" else None
                    for program in args.programs:
                        if program == "encode" and tower in towers:
                            continue
                        identity = (model, args.dtype, device, jax.__version__, args.text, batch)
                        yield Wanted(*identity, method, budget, action, program, args.mesh)
                    towers.add(tower)


def accounts(route: Sequence[Wanted], chips: Sequence[jax.Device]) -> Iterator[tuple[Wanted, ProgramCost]]:
    """Of programs of one model, batch size and schedule."""
    one = route[0]
    named = argparse.Namespace(random=one.model, dtype=one.dtype, grid=None, text=one.text)
    mesh = None if one.mesh is None else plain_mesh(one.mesh, chips)
    subject = open_subject(named, shapes_only=True, mesh=mesh)
    options = {} if one.method == "none" else {"budget": one.budget, "action": one.action}
    schedule = subject.plan(one.method, **options)
    start = time.perf_counter()
    programs = trace_programs(subject, schedule, sample(subject, one.batch), chips[0])
    traced = time.perf_counter() - start
    for each in route:
        yield each, account(programs[each.program], chips[0], traced / len(programs))


def account(program: jax.stages.Traced, device: jax.Device, seconds: float) -> ProgramCost:
    """Lower and compile. seconds: that tracing took."""
    start = time.perf_counter()
    lowered = program.lower(lowering_platforms=(device.platform,))
    middle, busy = time.perf_counter(), time.process_time()
    done, needs = None, None
    try:
        done = lowered.compile()
    except jax.errors.JaxRuntimeError as problem:
        needs = memory_needed(str(problem))
    end, busy = time.perf_counter(), time.process_time() - busy
    text = lowered.as_text()
    cost = ProgramCost(
        trace_seconds=seconds + middle - start,
        compile_seconds=end - middle,
        compile_cpu_seconds=busy,
        operations=text.count(" = stablehlo.") + text.count(' = "stablehlo.'),
        sorts=text.count("stablehlo.sort") + text.count("chlo.top_k"),
        scatters=text.count('"stablehlo.scatter"('),
        needs=needs,
    )
    return cost if done is None else replace(cost, **told_by(done))


def memory_needed(said: str) -> str:
    """What the compiler says of a program that is too large for a chip. Raises RerouteError for any other failure."""
    found = re.search(r"RESOURCE_EXHAUSTED.*?\(([\d.]+G)\) exceeds available \w+ \(([\d.]+G)\)", said, re.DOTALL)
    if found is None:
        raise RerouteError(f"the compiler fails: {' '.join(said.split())[:300]}")
    return "{} of {}".format(*found.groups())


def told_by(done: jax.stages.Compiled) -> dict[str, Any]:
    """The fields of a `ProgramCost` that only a compiled program has."""
    memory, cost = done.memory_analysis(), done.cost_analysis()
    found = list(collectives(done.as_text()))
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "flops": cost.get("flops", 0.0),
        "moved_bytes": cost.get("bytes accessed", 0.0),
        "collectives": dict(Counter(one.kind for one in found)),
        "told": sum(one.size for one in found),
    }


def table(known: dict[Wanted, ProgramCost]) -> str:
    """Markdown."""
    lines = [
        "| model | mesh | batch | method | program | trace s | compile s | of CPU | arguments GB | temporaries GB "
        "| TFLOPs | GB moved | operations | sorts | scatters | collectives | numbers told |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one, of in sorted(known.items(), key=lambda entry: _place(entry[0])):
        method = " ".join(str(part) for part in (one.method, one.action, one.budget) if part is not None)
        cells = [one.model, one.mesh or "", str(one.batch), method, one.program]
        cells += [f"{of.trace_seconds:.1f}", f"{of.compile_seconds:.1f}", f"{of.compile_cpu_seconds:.1f}"]
        cells += _memory(of)
        cells += [str(of.operations), str(of.sorts), str(of.scatters)]
        told = sorted((of.collectives or {}).items())
        cells += [", ".join(f"{count} {kind}" for kind, count in told), "" if of.told is None else f"{of.told:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _memory(of: ProgramCost) -> list[str]:
    if of.needs is not None:
        return [f"does not fit: {of.needs}", "", "", ""]
    gigabytes = [f"{of.argument_bytes / 1e9:.2f}", f"{of.temporary_bytes / 1e9:.2f}"]
    return [*gigabytes, f"{of.flops / 1e12:.2f}", f"{of.moved_bytes / 1e9:.1f}"]


def _place(one: Wanted) -> tuple:
    order = (PROGRAMS.index(one.program), METHODS.index(one.method), -(one.budget or 0), one.action or "")
    return one.model, one.dtype, one.mesh or "", one.batch, *order


def _parser() -> Parser:
    examples = (
        "--platform tpu --topology v5e:2x2 --random llava-1.5-7b qwen2.5-vl-7b",
        "--topology v5e:2x4 --mesh model=8 --random llava-1.5-13b --batch-sizes 8 --methods none pdrop",
        "--topology v6e:2x2 --batch-sizes 1 --out runs/aot-v6e",
    )
    parser = Parser("benchmarks.aot", __doc__, examples)
    run, data, route, output = (parser.group(title) for title in (RUN, DATA, ROUTE, OUTPUT))
    run.add_argument("--platform", default="tpu", help="of jax (default: %(default)s)")
    run.add_argument("--topology", default="v5e:2x2", help="that has the chip (default: %(default)s)")
    run.add_argument(
        "--random", nargs="+", choices=tuple(SHAPES), default=["llava-1.5-7b"], help="models (default: llava-1.5-7b)"
    )
    run.add_argument("--dtype", choices=tuple(FLOATS), default="bfloat16", help="(default: %(default)s)")
    add_mesh_argument(parser)
    run.add_argument(
        "--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), help="to compile (default: all three)"
    )
    data.add_argument("--text", type=positive, default=64, help="text tokens of a prompt (default: %(default)s)")
    data.add_argument(
        "--batch-sizes", nargs="+", type=positive, default=[1, 8], metavar="B", help="prompts at a time (default: 1 8)"
    )
    route.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(default: all)")
    route.add_argument(
        "--budgets", nargs="+", type=int, choices=tuple(TIERS), default=[192, 64], help="(default: 192 64)"
    )
    route.add_argument(
        "--actions", nargs="+", choices=ACTIONS, default=["delete", "reroute"], help="(default: delete reroute)"
    )
    output.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
