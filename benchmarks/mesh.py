"""`python -m benchmarks.mesh --meshes model=8 data=2,model=4 --families qwen2.5 --methods pdrop nuwa`

Tiny random models of every family on meshes of eight devices, which this machine's CPU plays, against the same models
on one: selections and greedy tokens must be equal, and logits within 1e-4. For each prefill it counts what devices tell
each other. A line a comparison; a run that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

# Programs run once here: they are compiled in one piece and without LLVM's optimisation, which comes after what devices
# tell each other is decided.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_parallel_codegen_split_count=1"
).strip()

import jax
import numpy as np
from tqdm import tqdm

import reroute_jax
from benchmarks.lines import line, read
from evals.speed.checkpoint_shapes import SHAPES, DecoderShape, Shape
from evals.speed.collectives import collectives
from evals.speed.subjects import Sample, Subject, random_model, sample
from reroute_jax.commandline.parsing import OUTPUT, ROUTE, RUN, Parser, argument_of, exit_code
from reroute_jax.engine import programs
from reroute_jax.engine.running import run_decode
from reroute_jax.engine.sampling import Sampling
from reroute_jax.errors import RerouteError
from reroute_jax.mesh import mesh_sizes, open_mesh
from reroute_jax.nn.sharding import on_mesh
from reroute_jax.routing.stages import ACTIONS

DEVICES = 8
MESHES = ("model=8", "data=2,model=4", "data=4,model=2", "data=8")
_TOWER = {"vision_width": 32, "vision_mlp": 48}


def _decoder(kv_heads: int) -> DecoderShape:
    return DecoderShape(384, 64, 96, 4, 8, kv_heads)


# KV heads: one a device, fewer than devices, and as a tower with fewer heads than devices.
FAMILIES: dict[str, tuple[Shape, tuple[int, int]]] = {
    "llava": (replace(SHAPES["llava-tiny"], **_TOWER, decoder=_decoder(8), image=84), (6, 6)),
    "qwen2.5": (replace(SHAPES["qwen-tiny"], **_TOWER, decoder=_decoder(2), vision_heads=8), (4, 6)),
    "qwen3": (replace(SHAPES["qwen3-tiny"], **_TOWER, decoder=_decoder(4), vision_heads=4), (4, 6)),
}
METHODS = ("none", "fastv", "pdrop", "nuwa", "ivc", "v2drop", "divprune", "visionzip", "pool")
WITHOUT_ACTION = ("none", "divprune", "visionzip", "pool")
BUDGET, TEXT, ROWS, NEW_TOKENS, BOUND = 192, 16, 8, 8, 1e-4


@dataclass(frozen=True)
class MeshCase:
    family: str
    mesh: str
    method: str
    action: str


@dataclass(frozen=True)
class MeshOutcome:
    """logits: the largest difference. collectives: of the prefill, how many of each kind; largest: the most numbers
    that one of them gives a device, as a share of all rows' hidden states at the decoder's input."""

    logits: float
    selections_equal: bool
    tokens_equal: bool
    collectives: dict[str, int]
    largest: float

    @property
    def equal(self) -> bool:
        return self.logits <= BOUND and self.selections_equal and self.tokens_equal


@dataclass(frozen=True)
class MeshAnswer:
    """program: the compiled prefill."""

    logits: np.ndarray
    selected: tuple[np.ndarray, ...]
    tokens: np.ndarray
    program: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, 1 where something is not equal, or 2 after one line on bad input."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: compare(args), args.debug)


def compare(args: argparse.Namespace) -> int:
    jax.config.update("jax_platforms", "cpu")
    if len(jax.devices()) < DEVICES:
        raise RerouteError(f"JAX was started with {len(jax.devices())} devices: run this command in its own process")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    known = read(args.out, MeshCase, MeshOutcome)
    todo = [case for case in cases(args) if case not in known]
    with tqdm(total=len(todo), unit="case") as bar, args.out.open("a") as file:
        for case, outcome in outcomes(todo):
            known[case] = outcome
            file.write(line(case, outcome))
            file.flush()
            bar.update()
    asked = {case: known[case] for case in cases(args)}
    print(table(asked))
    return 0 if all(outcome.equal for outcome in asked.values()) else 1


def cases(args: argparse.Namespace) -> Iterator[MeshCase]:
    """Everything that the arguments name, those of one model and schedule together."""
    for family in args.families:
        for method in args.methods:
            for action in [""] if method in WITHOUT_ACTION else args.actions:
                yield from (MeshCase(family, mesh, method, action) for mesh in args.meshes)


def outcomes(todo: Sequence[MeshCase]) -> Iterator[tuple[MeshCase, MeshOutcome]]:
    for (family, method, action), group in groupby(todo, lambda case: (case.family, case.method, case.action)):
        subject = opened(family)
        given = sample(subject, ROWS)
        alone = answered(subject, method, action, given)
        for case in group:
            yield case, outcome(alone, answered(split(subject, case.mesh), method, action, given), subject)


def opened(family: str) -> Subject:
    shape, grid = FAMILIES[family]
    return Subject(family, *random_model(shape, "float32"), grid, TEXT)


def split(subject: Subject, mesh: str) -> Subject:
    """The same weights on a mesh."""
    model = subject.model
    shapes = on_mesh(reroute_jax.abstract_params(model.config), open_mesh(mesh, model.config.decoder))
    module = jax.tree.map(lambda value, shape: jax.device_put(value, shape.sharding), model.module, shapes)
    return replace(subject, model=replace(model, module=module))


def outcome(alone: MeshAnswer, split: MeshAnswer, subject: Subject) -> MeshOutcome:
    told = list(collectives(split.program))
    hidden = ROWS * (TEXT + subject.visual) * subject.config.decoder.hidden_size
    selections = zip(alone.selected, split.selected, strict=True)
    return MeshOutcome(
        logits=float(np.abs(alone.logits - split.logits).max()),
        selections_equal=all(np.array_equal(one, other) for one, other in selections),
        tokens_equal=np.array_equal(alone.tokens, split.tokens),
        collectives=dict(Counter(one.kind for one in told)),
        largest=max((one.size for one in told), default=0) / hidden,
    )


def answered(subject: Subject, method: str, action: str, given: Sample) -> MeshAnswer:
    options = {} if method == "none" else {"budget": BUDGET}
    schedule = subject.plan(method, **options, **({"action": action} if action else {}))
    weights, batch = subject.model.weights, given.batch(subject.model, schedule)
    features = programs.encode(weights, batch.images)
    program, _ = programs.prefill.compile(weights.decoder, batch.prompt, *features, batch.plan)
    found = program(weights.decoder, batch.prompt, *features)
    logits, selected = np.asarray(found.logits), tuple(np.asarray(one.selected) for one in found.decisions)
    segments = run_decode(weights, batch, found, range(ROWS), Sampling(limit=NEW_TOKENS))
    tokens = np.concatenate([segment.tokens for segment in segments], axis=1)
    return MeshAnswer(logits, selected, tokens, program.as_text())


def table(found: dict[MeshCase, MeshOutcome]) -> str:
    """Markdown."""
    lines = [
        "| model | mesh | method | logits differ by | selections | tokens | collectives of the prefill | the largest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, of in found.items():
        equal = ["equal" if same else "DIFFERENT" for same in (of.selections_equal, of.tokens_equal)]
        told = ", ".join(f"{count} {kind}" for kind, count in sorted(of.collectives.items())) or "none"
        route = f"{case.method} {case.action}".strip()
        cells = [case.family, case.mesh, route, f"{of.logits:.1e}", *equal, told, f"{of.largest:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@argument_of
def _mesh(text: str) -> str:
    if math.prod(mesh_sizes(text).values()) > DEVICES:
        raise RerouteError(f"{text!r} takes more than the {DEVICES} devices that there are")
    return text


def _parser() -> Parser:
    examples = (
        "",
        "--families qwen2.5 --meshes model=8",
        "--methods pdrop nuwa --actions reroute --out runs/mesh.jsonl",
    )
    parser = Parser("benchmarks.mesh", __doc__, examples)
    run, route, output = (parser.group(title) for title in (RUN, ROUTE, OUTPUT))
    run.add_argument("--families", nargs="+", choices=tuple(FAMILIES), default=list(FAMILIES), help="(default: all)")
    run.add_argument("--meshes", nargs="+", type=_mesh, default=list(MESHES), help=f"(default: {' '.join(MESHES)})")
    route.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(default: all)")
    route.add_argument(
        "--actions", nargs="+", choices=ACTIONS, default=["delete", "reroute"], help="(default: delete reroute)"
    )
    output.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/mesh.jsonl"), help="(default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
