"""`python -m evals.bench`: what routing buys on the clock, beside what it should buy.

Every method, action, budget and batch size is compiled ahead of time, then all of them take turns, so that a machine
that slows down slows them all. Reported are medians, and ratios to the run with all tokens beside the theoretical ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import resource
import shlex
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from evals.harness.run_folder import write_json
from evals.speed.bench_report import TimingRecord, figure, rows_of, table
from evals.speed.programs import Answer, Compiled, Programs, Steps, compile_programs, compile_tower
from evals.speed.roofline import Machine, NumberSizes, decode_bound, measure_machine, prefill_bound
from evals.speed.subjects import Sample, Subject, add_subject_arguments, open_subject, sample
from reroute_jax.commandline.loading import add_bits_arguments, add_mesh_argument, load_options
from reroute_jax.commandline.parsing import (
    DATA,
    OUTPUT,
    ROUTE,
    RUN,
    Parser,
    budget,
    exit_code,
    new_tokens,
    positive,
    positive_number,
)
from reroute_jax.errors import RerouteError
from reroute_jax.routing.methods import METHODS
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.stages import ACTIONS
from reroute_jax.routing.switches import SWITCHES

Call = Callable[[], Answer]


@dataclass(frozen=True)
class Variant:
    """One way to route. method, action, budget: as asked for, action and budget None where they mean nothing."""

    method: str
    action: str | None
    budget: str | None
    schedule: Schedule

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.method, self.action, self.budget) if part)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 after one line on bad input."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: bench(args, list(sys.argv[1:] if argv is None else argv)), args.debug)


def bench(args: argparse.Namespace, arguments: Sequence[str]) -> None:
    if args.peer and args.quantise:
        raise RerouteError("--peer computes with the weights before they are quantised: leave out one of the two")
    # A cached program would not show what compiling costs.
    jax.config.update("jax_enable_compilation_cache", False)
    subject = open_subject(args, args.compile_only, **load_options(args))
    variants = plan_variants(subject, args)
    samples = {batch: sample(subject, batch) for batch in args.batch_sizes}
    if args.compile_only:
        print(compile_table(_compile_all(subject, variants, samples, args)))
        return
    machine = measure_machine(subject.model.dtype)
    programs = _compile_all(subject, variants, samples, args)
    calls = {key: partial(made.run, made.prepare(samples[key[1]])) for key, made in programs.items()}
    calls |= _peers(subject, variants, samples, args) if args.peer else {}
    load_before = os.getloadavg()
    times = measure(calls, args.repetitions)
    load = [load_before, os.getloadavg()]
    records = [
        _record(subject, machine, key, times[key], programs.get(key), variants, args.new_tokens) for key in calls
    ]
    unchanged = _rows_unchanged(programs, samples)
    records = [dataclasses.replace(one, rows_unchanged=unchanged.get((one.variant, one.batch))) for one in records]
    rows = rows_of(records, args.peak_tflops)
    text = table(rows)
    print(text)
    folder = args.out or Path("runs") / "bench" / subject.name.replace("/", "--")
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "command": shlex.join(["python", "-m", "evals.bench", *arguments]),
        "model": {
            "name": subject.name,
            "dtype": subject.model.dtype,
            **load_options(args),
            "visual": subject.visual,
            "text": subject.text,
        },
        "machine": describe_machine(machine),
        "load_average": {"before": load[0], "after": load[1]},
        "peak_tflops": args.peak_tflops,
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        # Of an accelerator's own memory, by JAX alone; the CPU backend keeps no such count.
        "device_peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "rows": rows,
        "seconds": {f"{one.variant}, batch {one.batch}": one.seconds for one in records},
    }
    write_json(folder / "bench.json", result)
    (folder / "table.md").write_text(text + "\n")
    if args.figure:
        figure(rows, folder / "figure.png")
    print(f"\nbench.json, table.md: {folder}")


def plan_variants(subject: Subject, args: argparse.Namespace) -> list[Variant]:
    """All tokens first, then every method (with `:every`, `:every:K` behind it) at every budget and action, then the
    schedules that were written down."""
    found = [Variant("none", None, None, subject.plan("none"))]
    for asked in args.methods:
        method, _, decisions = asked.partition(":")
        if method not in METHODS:
            raise RerouteError(f"method is {method!r}, expected one of: {', '.join(METHODS)}")
        known = METHODS[method]
        options = {"decisions": decisions} if decisions else {}
        if args.first_decision is not None and method in SWITCHES["first_decision"].methods:
            options["first_decision"] = args.first_decision
        for share in args.budgets if known.has_budget else (None,):
            for action in args.actions if known.has_actions else (None,):
                given = options | ({"action": action} if action else {})
                schedule = subject.plan(method, budget=share, **given)
                found.append(Variant(asked, action, None if share is None else str(share), schedule))
    for path in args.schedules:
        schedule = Schedule.from_file(path)
        schedule.check_depth(subject.model.config.num_layers)
        found.append(Variant(path.stem, None, None, schedule))
    return found


def measure(calls: dict[Any, Call], repetitions: int) -> dict[Any, list[Steps]]:
    """Seconds of (tower, prefill, decode) of every call, taking turns; a first round is not counted."""
    times = {key: [] for key in calls}
    for number in tqdm(range(repetitions + 1), desc="rounds"):
        for key, call in calls.items():
            seconds, _ = call()
            if number:
                times[key].append(seconds)
    return times


def compile_table(programs: dict[tuple[str, int], Programs]) -> str:
    """Markdown: seconds that each program took to compile, and what it would hold."""
    lines = ["| run | batch | tower s | prefill s | decode s | cache MB | memory MB |", "|---|---|---|---|---|---|---|"]
    for (name, batch), made in programs.items():
        seconds = " | ".join(f"{step.seconds:.1f}" for step in (made.tower, made.prefill, made.decode))
        lines.append(f"| {name} | {batch} | {seconds} | {made.cache_bytes / 1e6:.0f} | {made.memory_bytes / 1e6:.0f} |")
    return "\n".join(lines)


def describe_machine(machine: Machine) -> dict[str, Any]:
    """The processor, without names of hosts or users."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": _cpu_model() if device.platform == "cpu" else device.device_kind,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "gemm_gflops": machine.flops / 1e9,
        "read_gb_per_s": machine.bandwidth / 1e9,
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _compile_all(
    subject: Subject, variants: Sequence[Variant], samples: dict[int, Sample], args: argparse.Namespace
) -> dict[tuple[str, int], Programs]:
    wanted = [(variant, batch) for batch in samples for variant in variants]
    schedules = {(variant.schedule.merge, batch): variant.schedule for variant, batch in wanted}

    def tower(batch: int, schedule: Schedule) -> Compiled:
        return compile_tower(subject, schedule, samples[batch])

    def made(variant: Variant, batch: int) -> Programs:
        encode = towers[variant.schedule.merge, batch].result()
        return compile_programs(subject, variant.schedule, samples[batch], encode, args.new_tokens)

    with ThreadPoolExecutor(args.compile_threads) as pool:
        towers = {key: pool.submit(tower, key[1], schedule) for key, schedule in schedules.items()}
        making = {(variant.name, batch): pool.submit(made, variant, batch) for variant, batch in wanted}
        return {key: one.result() for key, one in tqdm(making.items(), desc="compiling")}


def _peers(
    subject: Subject, variants: Sequence[Variant], samples: dict[int, Sample], args: argparse.Namespace
) -> dict[tuple[str, int], Call]:
    """transformers unrouted at every batch size, the eager reference routed at batch 1."""
    try:
        from evals.speed import bench_torch
    except ImportError as error:
        raise RerouteError(f"--peer torch needs PyTorch ({error}): pip install -e '.[torch]'") from error
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    bench_torch.check_device(device)
    model = bench_torch.torch_model(subject, device, os.cpu_count())
    calls = {
        ("torch", batch): bench_torch.unrouted(subject, model, given, args.new_tokens)
        for batch, given in samples.items()
    }
    if device == "cpu" and 1 in samples:
        calls |= {
            (f"torch reference: {variant.name}", 1): bench_torch.routed(
                subject, model, samples[1], variant.schedule, args.new_tokens
            )
            for variant in variants[1:]
        }
    return calls


def _record(
    subject: Subject,
    machine: Machine,
    key: tuple[str, int],
    seconds: list[Steps],
    programs: Programs | None,
    variants: Sequence[Variant],
    new_tokens: int,
) -> TimingRecord:
    name, batch = key
    variant = next((one for one in variants if one.name == name.removeprefix("torch reference: ")), variants[0])
    schedule, config, model = variant.schedule, subject.model.config.decoder, subject.model
    cost = subject.account(schedule)
    entering = schedule.merged_count(subject.visual, subject.grid)
    sizes = NumberSizes.of(model)
    prompts = {"visual": entering, "text": subject.text, "batch": batch, "sizes": sizes}
    return TimingRecord(
        variant=name,
        method=variant.method,
        action=variant.action,
        budget=variant.budget,
        batch=batch,
        peer=programs is None,
        seconds=seconds,
        new_tokens=new_tokens,
        average=cost.average,
        macs=cost.prompt.gqa,
        scoring_macs=cost.prompt.scoring,
        merging_macs=cost.merging,
        bound_seconds=prefill_bound(machine, schedule, config, **prompts),
        decode_bound_seconds=decode_bound(machine, config, kv_bytes=cost.kv_bytes * batch, batch=batch, sizes=sizes),
        kv_bytes=cost.kv_bytes * batch,
        cache_bytes=programs.cache_bytes if programs else None,
        compile_seconds=programs.compile_seconds if programs else None,
        memory_bytes=programs.memory_bytes if programs else None,
    )


def _rows_unchanged(
    programs: dict[tuple[str, int], Programs], samples: dict[int, Sample]
) -> dict[tuple[str, int], str]:
    """Of every larger batch, how many rows answer as they do alone."""
    found = {}
    larger = [key for key in programs if key[1] > 1 and (key[0], 1) in programs]
    for name, batch in tqdm(larger, desc="rows alone", disable=not larger):
        given = samples[batch]
        many, single = programs[name, batch], programs[name, 1]
        _, together = many.run(many.prepare(given))
        alone = [single.run(single.prepare(given.row(number)))[1][0] for number in range(batch)]
        same = sum(bool((a == b).all()) for a, b in zip(together, alone, strict=True))
        found[name, batch] = f"{same} of {batch}"
    return found


def _parser() -> Parser:
    examples = (
        "--methods pdrop nuwa --budgets 64",
        "--random bench-llava --peer torch",
        "--random qwen2.5-vl-7b --dtype bfloat16 --compile-only",
    )
    parser = Parser("evals.bench", __doc__, examples)
    add_subject_arguments(parser)
    add_mesh_argument(parser)
    add_bits_arguments(parser)
    run, data = parser.group(RUN), parser.group(DATA)
    route, output = parser.group(ROUTE), parser.group(OUTPUT)
    run.add_argument("--new-tokens", type=new_tokens, default=16, help="of each answer (default: %(default)s)")
    run.add_argument("--repetitions", type=positive, default=10, help="counted rounds (default: %(default)s)")
    run.add_argument("--peer", choices=("torch",), help="also time PyTorch on the same weights")
    run.add_argument(
        "--compile-threads",
        type=positive,
        default=1,
        metavar="N",
        help="programs that compile at a time; more than 1 make the seconds of each no longer its own (default: 1)",
    )
    run.add_argument("--compile-only", action="store_true", help="of --random: compile, without weights, and stop")
    data.add_argument(
        "--batch-sizes", nargs="+", type=positive, default=[1], metavar="B", help="prompts at a time (default: 1)"
    )
    route.add_argument(
        "--methods",
        nargs="+",
        default=["fastv", "pdrop", "nuwa"],
        metavar="METHOD[:DECISIONS]",
        help="methods, each with its own decisions or for example `pdrop:every` (default: fastv pdrop nuwa)",
    )
    route.add_argument(
        "--actions", nargs="+", choices=ACTIONS, default=["delete", "reroute"], help="(default: delete reroute)"
    )
    route.add_argument(
        "--schedules",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="schedules that were written down, too (default: none)",
    )
    route.add_argument(
        "--budgets",
        nargs="+",
        type=budget,
        default=[192, 128, 64],
        metavar="BUDGET",
        help="192, 128, 64, or shares such as 0.15 or 1/9 (default: 192 128 64)",
    )
    route.add_argument("--first-decision", type=int, help="layer of the first decision of methods other than nuwa")
    output.add_argument(
        "--peak-tflops",
        type=positive_number,
        metavar="X",
        help="the device's datasheet peak for the model's dtype, dense; adds the prefill's model FLOPs utilisation",
    )
    output.add_argument("--figure", action="store_true", help="also figure.png; needs the extra [plot]")
    output.add_argument("--out", type=Path, help="folder of the results (default: runs/bench/ and the model's name)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
