"""`python -m evals.profile`: what a prefill computes, keeps and spends its time on, stage by stage.

FLOPs stand twice: by the papers' formula, and by XLA's own count of the program. Cached tokens and bytes are those of
the program's buffers. Time is a trace of the program, by the scopes that the decoder names.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from evals.harness.routes import DEFAULT_METHOD, add_comparison_arguments, check_routes, plan_routes
from evals.harness.run_folder import write_json
from evals.speed.subjects import Subject, add_subject_arguments, open_subject, sample
from reroute_jax.commandline.parsing import DATA, OUTPUT, RUN, Parser, exit_code, positive, whole
from reroute_jax.commandline.routes import add_route_arguments
from reroute_jax.engine import programs
from reroute_jax.engine.batching import Batch
from reroute_jax.errors import RerouteError
from reroute_jax.nn.cache import ROOM
from reroute_jax.routing.cost import compute, kv_width, repair_macs, scored_rows
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.static_plan import RoutingPlan, StagePlan

# Scopes of `decoder.prefill` in the names of operations; an operation belongs to the first that it names.
PARTS = ("embedding", "scoring", "select", "gather", "scatter", "attention", "mlp", "head")
OTHER = "other"

# In a trace: planes of GPUs, and in them the lines of their streams.
GPU_PLANE, GPU_STREAM = "/device:GPU:", "Stream #"


@dataclass(frozen=True)
class StageCost:
    """One stage of one batch. rows: of each sequence that its layers run on; TFLOPs count two per multiply-accumulate.

    formula, scoring: by section 8. reused: in both of them, key projections that the decision layer takes over from
    scoring. xla: of the stage with its decision, by XLA before optimisation. kv_tokens, kv_bytes: slots and bytes that
    each of its layers caches for the batch, room for new tokens left out.
    """

    lo: int
    hi: int
    rows: int
    formula: float
    scoring: float
    reused: float
    xla: float
    kv_tokens: int
    kv_bytes: int

    @property
    def expected(self) -> float:
        """What the program has to compute."""
        return self.formula + self.scoring - self.reused


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 after one line on bad input."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: profile(args), args.debug)


def profile(args: argparse.Namespace) -> None:
    check_routes(args)
    subject = open_subject(args)
    results = {}
    for run in plan_routes(args, subject).runs:
        costs = stage_costs(subject, run.schedule, args.batch_size)
        seconds = part_seconds(subject, run.schedule, args.batch_size, args.repetitions)
        print(f"\n{run.schedule.label}, batch {args.batch_size}\n\n{stage_table(costs)}\n\n{part_table(seconds)}")
        results[run.name] = {"stages": [vars(cost) for cost in costs], "seconds": seconds}
    if args.out:
        write_json(args.out, results)


def stage_costs(subject: Subject, schedule: Schedule, batch: int) -> list[StageCost]:
    """XLA's count of a stage is that of the program up to it less that of the program before it.

    Counted is what JAX hands to XLA, lowered for the CPU whatever the backend: the GPU plugin offers no count of it.
    """
    if schedule.cut_caches == "all_but_first":
        raise RerouteError(
            "cut_caches='all_but_first' gives layer 0 a cache of its own: profile the schedule with 'all'"
        )
    lowered = lower_prefill(subject, sample(subject, batch).batch(subject.model, schedule))

    def counted(plan: RoutingPlan):
        with jax.default_device(jax.devices("cpu")[0]):
            return lowered(plan)

    config, costs = subject.model.config.decoder, []
    entering = schedule.merged_count(subject.visual, subject.grid)
    plan = schedule.resolve(entering)
    scored = iter(zip(scored_rows(schedule, entering), repair_macs(schedule, config, entering), strict=True))
    before = _flops(counted(replace(plan, stages=(_empty(plan.stages[0]),))))
    for number, stage in enumerate(plan.stages):
        program = counted(replace(plan, stages=plan.stages[: number + 1]))
        cached, total = program.out_info.cache.stages[number], _flops(program)
        rows = subject.text + (entering if stage.cap is None else stage.cap + stage.proxies)
        (visual, score), repair = ((0, None), 0) if stage.cap is None else next(scored)
        scoring = 0 if score is None else score.macs(config, visual, subject.text) + repair
        reuses = score is not None and score.reuses_keys and plan.position_mode == "original" and not stage.proxies
        buffers = [*cached.keys[:1], *cached.values[:1]]
        costs.append(
            StageCost(
                lo=stage.lo,
                hi=stage.hi,
                rows=rows,
                formula=2e-12 * batch * compute(config, [rows] * (stage.hi - stage.lo), []).gqa,
                scoring=2e-12 * batch * scoring,
                reused=2e-12 * batch * rows * config.hidden_size * kv_width(config) if reuses else 0.0,
                xla=1e-12 * (total - before),
                kv_tokens=batch * (buffers[0].shape[2] - ROOM),
                kv_bytes=sum(one.size // one.shape[2] * (one.shape[2] - ROOM) * one.dtype.itemsize for one in buffers),
            )
        )
        before = total
    return costs


def part_seconds(subject: Subject, schedule: Schedule, batch: int, repetitions: int) -> dict[str, float]:
    """Seconds of a prefill by part, on the average of `repetitions` traced runs after two others. Operations that run
    side by side count each with its own time: together they are longer than the prefill."""
    model = subject.model
    given = sample(subject, batch).batch(model, schedule)
    inputs = jax.device_put(given.prompt)
    features, anchors = programs.encode(model.weights, given.images)
    program = lower_prefill(subject, given)(given.plan).compile()

    def call() -> None:
        jax.block_until_ready(program(model.weights.decoder, inputs, features, anchors))

    call()
    call()
    scopes = operation_scopes(program.as_text())
    found = dict.fromkeys((*PARTS, OTHER), 0.0)
    for name, seconds in traced_operations(call, repetitions).items():
        found[part_of(scopes.get(name, ""))] += seconds / repetitions
    return found


def lower_prefill(subject: Subject, given: Batch) -> Callable[[RoutingPlan], Any]:
    """What lowers the engine's prefill of these inputs under any plan; nothing runs."""
    # Shapes in place of the weights, which would tie the program to the device that they are on.
    decoder = jax.eval_shape(lambda weights: weights, subject.model.weights.decoder)
    features, anchors = programs.encode.jitted().eval_shape(subject.model.weights, given.images)
    return lambda plan: programs.prefill.jitted().lower(decoder, given.prompt, features, anchors, plan)


def operation_scopes(hlo: str) -> dict[str, str]:
    """Name of every instruction of an HLO text -> the scopes it was traced in."""
    found = re.findall(r"^\s*(?:ROOT )?%?([\w.-]+) = .*?op_name=\"([^\"]*)\"", hlo, re.MULTILINE)
    return dict(found)


def part_of(scope: str) -> str:
    """The part that an operation's scopes name first."""
    names = scope.split("/")
    return next((part for name in names for part in PARTS if name == part), OTHER)


def traced_operations(call: Callable[[], None], repetitions: int) -> dict[str, float]:
    """Seconds of every operation of the programs that `call` runs, added up over `repetitions` calls."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repetitions):
                call()
        (file,) = Path(folder).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
        events = [
            (dict(event.stats).get("hlo_op"), event.duration_ns)
            for line in operation_lines(planes)
            for event in line.events
        ]
    seconds: dict[str, float] = {}
    for name, nanoseconds in events:
        if name is not None:
            seconds[name] = seconds.get(name, 0.0) + nanoseconds / 1e9
    if not seconds:
        raise RerouteError("the trace of this backend names no operations, there is no time by part")
    return seconds


def operation_lines(planes: Sequence[Any]) -> list[Any]:
    """Lines of a trace whose events are operations, each once. On a GPU these are the streams that kernels ran in: the
    host's launches, and the lines that the profiler derives from the kernels, name the same operations again."""
    gpu = [line for plane in planes if plane.name.startswith(GPU_PLANE) for line in plane.lines]
    if gpu:
        return [line for line in gpu if line.name.startswith(GPU_STREAM)]
    return [line for plane in planes for line in plane.lines]


def stage_table(costs: Sequence[StageCost]) -> str:
    lines = [
        "| layers | rows | TFLOPs formula | scoring | reused | XLA | XLA / expected | KV tokens, a layer | KV kB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cost in costs:
        lines.append(
            f"| {cost.lo} to {cost.hi - 1} | {cost.rows} | {cost.formula:.4g} | {cost.scoring:.3g} | {cost.reused:.3g} "
            f"| {cost.xla:.4g} | {cost.xla / cost.expected:.3f} | {cost.kv_tokens} | {cost.kv_bytes / 1e3:.1f} |"
        )
    names = ("formula", "scoring", "reused", "xla", "expected")
    formula, scoring, reused, xla, expected = (sum(getattr(cost, name) for cost in costs) for name in names)
    tokens, nbytes = (sum(getattr(c, n) * (c.hi - c.lo) for c in costs) for n in ("kv_tokens", "kv_bytes"))
    lines.append(
        f"| all | | {formula:.4g} | {scoring:.3g} | {reused:.3g} | {xla:.4g} | {xla / expected:.3f} | {tokens} "
        f"| {nbytes / 1e3:.1f} |"
    )
    return "\n".join(lines)


def part_table(seconds: dict[str, float]) -> str:
    total = sum(seconds.values())
    lines = ["| part | ms, all threads | % |", "|---|---|---|"]
    lines += [f"| {part} | {1e3 * s:.2f} | {100 * s / total:.1f} |" for part, s in seconds.items()]
    return "\n".join([*lines, f"| all | {1e3 * total:.2f} | 100.0 |"])


def _empty(stage: StagePlan) -> StagePlan:
    return StagePlan(stage.lo, stage.lo, None, None, None)


def _flops(lowered) -> float:
    return lowered.cost_analysis()["flops"]


def _parser() -> Parser:
    examples = ("--method pdrop", "--random bench-llava --compare --budget 64", "--method fastv --out profile.json")
    parser = Parser("evals.profile", __doc__, examples)
    add_subject_arguments(parser)
    add_route_arguments(parser, DEFAULT_METHOD)
    add_comparison_arguments(parser)
    run = parser.group(RUN)
    run.add_argument("--repetitions", type=positive, default=5, help="traced runs (default: %(default)s)")
    run.add_argument("--seed", type=whole, default=0, help="of the method `random` (default: %(default)s)")
    parser.group(DATA).add_argument("--batch-size", type=positive, default=1, help="prompts (default: %(default)s)")
    parser.group(OUTPUT).add_argument("--out", type=Path, help="JSON file of the same numbers")
    return parser


if __name__ == "__main__":
    sys.exit(main())
