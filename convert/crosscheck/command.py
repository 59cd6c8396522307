"""`python -m convert.crosscheck SRC`: the same inputs through PyTorch and through JAX, compared number by number.

Without --method, --preset or --schedule the checkpoint runs on all tokens and PyTorch's side is transformers itself.
With one, the routed run is compared too, with an eager PyTorch implementation of the method's rules (`reference.py`).
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
from tqdm import tqdm

import reroute_jax
from convert.crosscheck.comparison import Line, compare_plain, compare_routed, merge, table
from convert.crosscheck.inputs import Probe, companions, make_probes
from convert.embedded import EMBEDDED, locate
from convert.opening import open_checkpoint
from convert.source import Source
from reroute_jax.commandline.loading import add_mesh_argument
from reroute_jax.commandline.parsing import DATA, RUN, Parser, exit_code, new_tokens, positive
from reroute_jax.commandline.routes import (
    DEFAULT_ACTION,
    DEFAULT_BUDGET,
    add_route_arguments,
    check_fixed,
    fixed_schedule,
    flag,
    given_route,
    given_switches,
)
from reroute_jax.config import ModelConfig
from reroute_jax.engine.batching import Question, lay_out, priors
from reroute_jax.engine.chat import open_layout
from reroute_jax.errors import RerouteError
from reroute_jax.models import FAMILIES
from reroute_jax.routing.found import FOUND, found_schedule
from reroute_jax.routing.methods import METHODS, plan
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.switches import AMOUNTS
from reroute_jax.types import Grid

if TYPE_CHECKING:
    from convert.crosscheck.plain import Plain
    from convert.crosscheck.reference import Reference


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, 1 for a difference beyond tolerance, 2 after one line on bad input."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: _report(crosscheck(args)), args.debug)


def _report(lines: Sequence[Line]) -> int:
    print(table(lines))
    failed = [line.quantity for line in lines if not line.passes]
    print(f"\n{len(failed)} of {len(lines)} quantities differ" if failed else "\nPyTorch and JAX agree")
    return 1 if failed else 0


def crosscheck(args: argparse.Namespace) -> list[Line]:
    """All comparisons, one line a quantity over all prompts. One framework's weights are in memory at a time.

    Raises RerouteError without PyTorch, and for a checkpoint or a method that cannot be used.
    """
    if importlib.util.find_spec("torch") is None:
        raise RerouteError("a cross-check needs PyTorch, which is not installed: pip install -e '.[torch]'")
    source, config = open_checkpoint(locate(args.src))
    if source.manifest is not None:
        raise RerouteError(f"{args.src} is a converted checkpoint: give the Hugging Face one, it is converted here")
    tokenizer, processor = companions(source, config)
    grid = FAMILIES[config.family].typical_grid(config, lambda: processor)
    schedule = _schedule(args, config, grid, source.folder)
    prompts = make_probes(config, open_layout(source.folder, tokenizer, config), processor, args.prompts)
    expected = _in_torch(source, config, prompts, schedule, args.max_new_tokens)
    model = reroute_jax.load(locate(args.src), dtype="float32", mesh=args.mesh)
    lines = []
    with jax.default_matmul_precision("highest"):
        for prompt, (plain, routed) in zip(tqdm(prompts, desc="JAX", unit="prompt"), expected, strict=True):
            lines += compare_plain(model, prompt, plain, args.max_new_tokens)
            if routed is not None:
                lines += compare_routed(model, prompt, routed, schedule, args.max_new_tokens)
    return merge(lines)


def _schedule(args: argparse.Namespace, config: ModelConfig, grid: Grid, folder: Path) -> Schedule | None:
    """What the arguments name, None where they name nothing."""
    asked = given_route(args)
    check_fixed(args, asked)
    fixed = fixed_schedule(args, config.num_layers)
    if fixed is not None:
        return fixed
    if args.method is None:
        if asked:
            raise RerouteError(f"{flag(asked[0])} belongs to a --method, name one")
        return None
    switches = given_switches(args)
    if args.method == FOUND:
        others = switches | ({"action": args.action} if args.action else {})
        budget = DEFAULT_BUDGET if args.budget is None else args.budget
        return found_schedule(folder, budget, **others)
    default = DEFAULT_BUDGET if METHODS[args.method].has_budget and not set(AMOUNTS) & set(switches) else None
    return plan(
        args.method,
        num_layers=config.num_layers,
        visual=grid[0] * grid[1],
        grid=grid,
        family=config.family,
        budget=default if args.budget is None else args.budget,
        action=args.action or DEFAULT_ACTION,
        **switches,
    )


def _in_torch(
    source: Source, config: ModelConfig, prompts: Sequence[Probe], schedule: Schedule | None, max_new: int
) -> list[tuple[Plain, Reference | None]]:
    from convert.crosscheck.plain import open_model, plain_run
    from convert.crosscheck.reference import run

    model, results = open_model(source.folder, config, max_new), []
    for prompt in tqdm(prompts, desc="PyTorch", unit="prompt"):
        routed = None
        if schedule is not None:
            layout = lay_out(Question(prompt.ids, prompt.grids), config, schedule)
            routed = run(
                model,
                prompt.ids,
                prompt.pixels,
                schedule,
                image_grid_thw=prompt.thw,
                prior=priors(schedule, [layout], layout.shape.visual)[:, 0],
                max_new_tokens=max_new,
                eos_tokens=config.eos_tokens,
                repetition_penalty=config.repetition_penalty,
            )
        results.append((plain_run(model, prompt.ids, prompt.pixels, prompt.thw), routed))
    return results


def _parser() -> Parser:
    examples = ("scenes-llava", "scenes-qwen --method nuwa --budget 64", "llava-hf/llava-1.5-7b-hf --method pdrop")
    parser = Parser("convert.crosscheck", __doc__, examples)
    run, data = parser.group(RUN), parser.group(DATA)
    run.add_argument(
        "src",
        metavar="SRC",
        help=f"hub id (owner/model), checkpoint folder with safetensors, or one of {', '.join(EMBEDDED)}",
    )
    run.add_argument("--max-new-tokens", type=new_tokens, default=32, help="length of an answer (default: %(default)s)")
    add_mesh_argument(parser)
    data.add_argument("--prompts", type=positive, default=2, help="pictures to ask about (default: %(default)s)")
    add_route_arguments(parser, "no routed run")
    return parser
