"""What it is worth to let each decision of a found schedule rank by some heads instead of by all.

    python -m benchmarks.head_selection --model scenes-qwen

goes through the decisions of the checkpoint's own found schedule, first to last. Each takes all heads, one head, or all
but one, whatever keeps the answers closest to those of all tokens on prompts without labels, with what the decisions
before it took. Then fresh prompts and labelled questions compare this with all heads, at the very same tokens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float
from tqdm import tqdm

from benchmarks.coverage_profile import calibrations
from benchmarks.found_schedules import (
    BOXES,
    Contender,
    add_found_budget_argument,
    add_run_arguments,
    add_scene_arguments,
    answered,
    boxes,
    points,
)
from evals.harness.cli import load_model
from evals.harness.identity import versions
from evals.harness.metrics import Resampler, difference
from evals.searching.calibration import Calibration
from evals.searching.candidates import Space
from evals.searching.outcome import shown
from evals.searching.search import gate
from reroute_jax.commandline.parsing import DATA, Parser, exit_code, positive
from reroute_jax.decoder import Decoder
from reroute_jax.engine.compilation import keep_programs
from reroute_jax.nn.layers import DecoderLayer
from reroute_jax.routing.budget import share_of
from reroute_jax.routing.found import FOUND
from reroute_jax.routing.plan import Schedule

ALL_HEADS, CHOSEN = "all heads", "chosen heads"
METRICS = (BOXES, "ACC@0.9")

Heads = tuple[int, ...]
Choice = Mapping[int, Heads]  # by the layer that decides; all heads where it has none


class HeadsLayer(DecoderLayer):
    """A layer whose decision sees some of its heads alone. weights: so that the mean over all heads, which ranks, is
    the mean over these; an array, so that every choice runs the same program."""

    def __init__(self, layer: DecoderLayer, weights: Float[np.ndarray, " N"]) -> None:
        self.attn_norm, self.attn = layer.attn_norm, layer.attn
        self.mlp_norm, self.mlp = layer.mlp_norm, layer.mlp
        self.weights = nnx.Param(jnp.asarray(weights, jnp.float32))

    def probabilities(self, *args, **kwargs):
        """As of a layer, each head times its weight."""
        found, keys = super().probabilities(*args, **kwargs)
        return found * self.weights.get_value()[:, None, None], keys


def weights_of(heads: Heads, count: int) -> Float[np.ndarray, " N"]:
    """Whose product with numbers of `count` heads has the mean over `heads` as its mean."""
    weights = np.zeros(count)
    weights[list(heads)] = count / len(heads)
    return weights


def with_heads(decoder: Decoder, choice: Choice) -> Decoder:
    """The decoder whose decisions rank by these heads. Parameters are shared."""
    chosen, count = jax.tree.map(lambda leaf: leaf, decoder), decoder.config.num_heads
    everything = tuple(range(count))
    chosen.layers = nnx.List(
        [HeadsLayer(layer, weights_of(choice.get(at, everything), count)) for at, layer in enumerate(decoder.layers)]
    )
    return chosen


def divergences(calibration: Calibration, schedule: Schedule, choice: Choice) -> Float[np.ndarray, " prompts"]:
    """As of `Calibration.divergences`, with these heads."""
    chunks = tuple(replace(one, decoder=with_heads(one.decoder, choice)) for one in calibration.chunks)
    return replace(calibration, chunks=chunks).divergences(schedule)


def options(count: int) -> list[Heads]:
    """Each head of so many alone, and all but each."""
    alone = [(head,) for head in range(count)]
    others = [tuple(head for head in range(count) if head != left) for left in range(count)]
    return list(dict.fromkeys([*alone, *others]))


def greedy(
    layers: Sequence[int], count: int, objective: Callable[[Choice], float], done: Callable[[], Any]
) -> tuple[dict[int, Heads], list[dict[str, Any]]]:
    """The choice, and of every decision what each option came to; all heads where no option is better. objective: is
    minimised. done: is called after each option."""
    choice: dict[int, Heads] = {}
    best, told = objective(choice), []
    for layer in layers:
        values = {}
        for heads in options(count):
            values[heads] = objective({**choice, layer: heads})
            done()
        told.append({"layer": layer, "before": best, "options": [[*each] for each in values.items()]})
        least = min(values, key=values.__getitem__)
        if values[least] < best:
            choice[layer], best = least, values[least]
    return choice, told


def compared(values: Mapping[str, Float[np.ndarray, " prompts"]], calibration: Calibration) -> dict[str, Any]:
    """Mean divergences, and that of the chosen heads minus that of all."""
    clusters = [one.cluster for one in calibration.asked]
    apart = gate(values[CHOSEN], values[ALL_HEADS], clusters, seed=0)
    return {name: float(each.mean()) for name, each in values.items()} | {"difference": asdict(apart)}


def accuracies(lines: Mapping[str, Sequence[Mapping[str, Any]]], runs: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """By metric its means, and that of the chosen heads minus that of all on the same questions. runs: what each is
    called in its lines."""
    scores = {
        name: np.array([[line["metrics"][runs[name]][metric] for metric in METRICS] for line in each])
        for name, each in lines.items()
    }
    labels = tuple(line["scene"] for line in lines[ALL_HEADS])
    pairs = difference(scores[CHOSEN], scores[ALL_HEADS], Resampler(labels))
    return {
        metric: {name: float(each[:, at].mean()) for name, each in scores.items()} | {"difference": asdict(pairs[at])}
        for at, metric in enumerate(METRICS)
    }


def told_choice(choice: Choice) -> str:
    """As `1:023 9:2`: layer, heads."""
    return " ".join(f"{layer}:{''.join(map(str, heads))}" for layer, heads in choice.items()) or ALL_HEADS


def markdown(about: Mapping[str, Any]) -> str:
    """A table a person can read."""
    rows = [f"`{about['schedule']}`, heads `{about['choice']}`", ""]
    rows += ["| | all heads | chosen heads | difference (95%) |", "|---|---|---|---|"]
    for name, of in about["divergence"].items():
        cells = [f"{of[which]:.4f}" for which in (ALL_HEADS, CHOSEN)]
        rows.append(f"| {' | '.join([f'{name} prompts', *cells, shown(of['difference'])])} |")
    for name, of in about["accuracy"].items():
        rows.append(
            f"| {name} | {100 * of[ALL_HEADS]:.1f} | {100 * of[CHOSEN]:.1f} | {points(of['difference'], '+')} |"
        )
    return "\n".join(rows)


def measure(args) -> None:
    if args.compilation_cache is not None:
        keep_programs(args.compilation_cache)
    model = load_model(args.model, None)
    schedule, share = model.plan(FOUND, budget=args.budget), str(share_of(args.budget, 10**6))
    layers, count = [stage.lo for stage in schedule.decisions], model.config.decoder.num_heads
    sizes = args.calibration_prompts, args.fresh_prompts
    calibration, fresh = calibrations(model, *sizes, args.batch_size, range(model.config.num_layers))
    with tqdm(total=len(layers) * len(options(count)), unit="option") as bar:
        choice, told = greedy(
            layers, count, lambda one: float(divergences(calibration, schedule, one).mean()), bar.update
        )
    choices = {ALL_HEADS: {}, CHOSEN: choice}
    about = {
        "model": args.model,
        "budget": share,
        "schedule": str(Space.of(model, None).candidate(schedule)),
        "choice": told_choice(choice),
        "decisions": told,
        "prompts": dict(zip(("calibration", "fresh"), sizes, strict=True)),
        "divergence": {
            name: compared({which: divergences(part, schedule, one) for which, one in choices.items()}, part)
            for name, part in (("calibration", calibration), ("fresh", fresh))
        },
        "start": args.start,
        "questions": args.limit,
        "versions": versions(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    stem = f"heads_{args.model}_{share.replace('/', '-')}"
    task, lines = boxes(model, args.start, args.limit), {}
    for name, one in choices.items():
        chosen = jax.tree.map(lambda leaf: leaf, model.module)
        chosen.decoder = with_heads(model.module.decoder, one)
        runs = [Contender(told_choice(one), share, schedule)]
        file = args.out / f"{stem}_{name.partition(' ')[0]}.jsonl"
        lines[name] = answered(replace(model, module=chosen), task, runs, file, args.batch_size)
    about["accuracy"] = accuracies(lines, {name: told_choice(one) for name, one in choices.items()})
    (args.out / f"{stem}.json").write_text(json.dumps(about, indent=1) + "\n")
    print(markdown(about))


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return exit_code(lambda: measure(args), args.debug, "stopped: the same command chooses again and asks the rest")


def _parser() -> Parser:
    examples = ("", "--model scenes-qwen --budget 1/3", "--calibration-prompts 64 --limit 64 --out runs")
    parser = Parser("benchmarks.head_selection", __doc__.splitlines()[0], examples)
    add_run_arguments(parser)
    add_scene_arguments(parser, limit=512)
    add_found_budget_argument(parser)
    data = parser.group(DATA)
    data.add_argument(
        "--calibration-prompts", type=positive, default=256, help="that heads are chosen on (default: %(default)s)"
    )
    data.add_argument("--fresh-prompts", type=positive, default=128, help="(default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
