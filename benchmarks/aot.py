"""`python -m benchmarks.aot --platform tpu --topology v5e:2x2 --random llava-1.5-7b --methods pdrop --budgets 64 192`

Compiles the programs of random models for one chip of an accelerator that this machine does not have, and prints what
the compiler says of them: its own time, arguments, temporaries, FLOPs and bytes. Shapes stand in for weights. For a TPU
it needs PyPI's `libtpu` in the version that `pip install jax[tpu]` takes. Programs that the results hold already are
not compiled again, so a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# Without it libtpu looks for a TPU's own machine and its metadata server.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
from jax.experimental import topologies
from tqdm import tqdm

from evals.harness.cli import Parser, exit_code, positive
from evals.speed.checkpoint_shapes import SHAPES
from evals.speed.programs import trace_programs
from evals.speed.subjects import QWEN_GRID, Subject, random_model, sample
from reroute_jax.config import ClipConfig
from reroute_jax.errors import RerouteError
from reroute_jax.types import FLOATS

PROGRAMS = ("encode", "prefill", "decode")
METHODS = ("none", "fastv", "pdrop", "nuwa")


@dataclass(frozen=True)
class Wanted:
    """One program to compile. budget, action: None for the method "none"."""

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

    @property
    def route(self) -> tuple:
        return self.model, self.batch, self.method, self.budget, self.action


@dataclass(frozen=True)
class Account:
    """By the compiler, a run: FLOPs, and bytes moved. compile_seconds: from the lowered text on."""

    trace_seconds: float
    compile_seconds: float
    argument_bytes: int
    temporary_bytes: int
    flops: float
    moved_bytes: float
    operations: int
    sorts: int
    scatters: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 after one line on bad input."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: compare(args, list(sys.argv[1:] if argv is None else argv)))


def compare(args: argparse.Namespace, arguments: Sequence[str]) -> None:
    # The arrays that programs are traced with live here, whatever the programs are for.
    jax.config.update("jax_platforms", "cpu")
    device = chip(args.platform, args.topology)
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / f"aot_{args.platform}.jsonl"
    known = read(results)
    todo = [one for one in wanted(args, device.device_kind) if one not in known]
    with tqdm(total=len(todo), desc="compiling", unit="program") as bar, results.open("a") as file:
        for route in dict.fromkeys(one.route for one in todo):
            of_route = [one for one in todo if one.route == route]
            for one, account in accounts(of_route, args.new_tokens, device):
                known[one] = account
                file.write(json.dumps({**asdict(one), **asdict(account)}) + "\n")
                file.flush()
                bar.update()
    command = shlex.join(["python", "-m", "benchmarks.aot", *arguments])
    text = f"`{command}`\n\n{table(known)}\n"
    (args.out / f"aot_{args.platform}.md").write_text(text)
    print(text)


def chip(platform: str, topology: str) -> jax.Device:
    """The first one of a topology. Raises RerouteError where this machine's compiler does not know it."""
    try:
        return topologies.get_topology_desc(platform=platform, topology_name=topology).devices[0]
    except (RuntimeError, ValueError, NotImplementedError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise RerouteError(
            f"no compiler for the topology {topology!r} of {platform!r} here ({reason}): for a TPU, install libtpu in "
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
                        yield Wanted(*identity, method, budget, action, program)
                    towers.add(tower)


def accounts(route: Sequence[Wanted], new_tokens: int, device: jax.Device) -> Iterator[tuple[Wanted, Account]]:
    """Of programs of one model, batch size and schedule."""
    one = route[0]
    model, hf_config = random_model(SHAPES[one.model], one.dtype, shapes_only=True)
    vision = model.config.vision
    grid = vision.grid if isinstance(vision, ClipConfig) else QWEN_GRID
    subject = Subject(one.model, model, hf_config, grid, one.text)
    options = {} if one.method == "none" else {"budget": one.budget, "action": one.action}
    schedule = subject.plan(one.method, **options)
    start = time.perf_counter()
    programs = trace_programs(subject, schedule, sample(subject, one.batch), new_tokens, device)
    traced = time.perf_counter() - start
    for each in route:
        yield each, account(programs[each.program], device, traced / len(programs))


def account(program: jax.stages.Traced, device: jax.Device, seconds: float) -> Account:
    """Lower and compile. seconds: that tracing took."""
    start = time.perf_counter()
    lowered = program.lower(lowering_platforms=(device.platform,))
    middle = time.perf_counter()
    done = lowered.compile()
    end = time.perf_counter()
    memory, cost, text = done.memory_analysis(), done.cost_analysis(), lowered.as_text()
    return Account(
        trace_seconds=seconds + middle - start,
        compile_seconds=end - middle,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        flops=cost.get("flops", 0.0),
        moved_bytes=cost.get("bytes accessed", 0.0),
        operations=text.count(" = stablehlo.") + text.count(' = "stablehlo.'),
        sorts=text.count("stablehlo.sort") + text.count("chlo.top_k"),
        scatters=text.count("stablehlo.scatter"),
    )


def read(results: Path) -> dict[Wanted, Account]:
    """What is there already, the last of equal entries."""
    found = {}
    for line in results.read_text().splitlines() if results.exists() else ():
        row = json.loads(line)
        of = (kind(**{name: row[name] for name in kind.__dataclass_fields__}) for kind in (Wanted, Account))
        found.update([tuple(of)])
    return found


def table(known: dict[Wanted, Account]) -> str:
    """Markdown."""
    lines = [
        "| model | batch | method | program | trace s | compile s | arguments GB | temporaries GB | TFLOPs | GB moved "
        "| operations | sorts | scatters |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one, of in sorted(known.items(), key=lambda entry: _place(entry[0])):
        method = " ".join(str(part) for part in (one.method, one.action, one.budget) if part is not None)
        cells = [one.model, str(one.batch), method, one.program]
        cells += [f"{of.trace_seconds:.1f}", f"{of.compile_seconds:.1f}"]
        cells += [f"{of.argument_bytes / 1e9:.2f}", f"{of.temporary_bytes / 1e9:.2f}"]
        cells += [f"{of.flops / 1e12:.2f}", f"{of.moved_bytes / 1e9:.1f}"]
        cells += [str(of.operations), str(of.sorts), str(of.scatters)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _place(one: Wanted) -> tuple:
    order = (PROGRAMS.index(one.program), METHODS.index(one.method), -(one.budget or 0), one.action or "")
    return one.model, one.dtype, one.batch, *order


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.aot", description=__doc__)
    parser.add_argument("--platform", default="tpu", help="of jax (default: %(default)s)")
    parser.add_argument("--topology", default="v5e:2x2", help="that has the chip (default: %(default)s)")
    parser.add_argument("--random", nargs="+", choices=tuple(SHAPES), default=["llava-1.5-7b"], help="shapes of models")
    parser.add_argument("--dtype", choices=tuple(FLOATS), default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--text", type=positive, default=64, help="text tokens of a prompt (default: %(default)s)")
    parser.add_argument("--new-tokens", type=positive, default=64, help="(default: %(default)s)")
    parser.add_argument("--batch-sizes", nargs="+", type=positive, default=[1, 8])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--budgets", nargs="+", type=positive, default=[192, 64])
    parser.add_argument("--actions", nargs="+", choices=("delete", "reroute"), default=["delete", "reroute"])
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
