"""What an int8 KV cache changes, against the same model's own. `python -m benchmarks.int8_cache --help`.

Both answer the same referring expressions, with all tokens and under PDrop with reroute. Beside how often the boxes are
right: how many answers have the same tokens, how far the logits are off while both are fed the exact model's tokens (a
prefill's are exact), and the bytes of a question's cache. A run that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import reroute_jax
from benchmarks.found_schedules import BOXES, boxes, scored
from benchmarks.lines import line, read
from convert.embedded import EMBEDDED
from evals.harness.metrics import Resampler, difference
from reroute_jax.commandline.parsing import DATA, OUTPUT, ROUTE, RUN, Parser, budget, exit_code, positive, whole
from reroute_jax.decoder import decode_step
from reroute_jax.engine.answers import Answer
from reroute_jax.engine.batching import Question, lay_out
from reroute_jax.engine.groups import batch_of
from reroute_jax.engine.model import Model
from reroute_jax.engine.running import run_prefill
from reroute_jax.nn.cache import ROOM
from reroute_jax.routing.plan import Schedule

MODELS = ("scenes-llava", "scenes-qwen")
FED = 8  # questions whose logits are compared


@dataclass(frozen=True)
class CacheCase:
    """share: of the visual tokens that run, "all" for a run that is not routed. start: the first test scene."""

    model: str
    share: str
    start: int
    questions: int


@dataclass(frozen=True)
class CacheOutcome:
    """exact, int8: ACC@0.5. minus, low, high: of int8 minus exact, with a paired 95% interval. alike: answers with
    the same tokens. logits: by how much of their length they are off, mean over all steps behind the prefill.
    exact_bytes, int8_bytes: of a question's cache with its answer, mean."""

    exact: float
    int8: float
    minus: float
    low: float
    high: float
    alike: int
    logits: float
    exact_bytes: float
    int8_bytes: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 after one line on bad input."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: compare(args), args.debug, "stopped: the same command goes on behind the last whole line")


def compare(args: argparse.Namespace) -> None:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    known, asked = read(args.out, CacheCase, CacheOutcome), list(cases(args))
    for number, case in enumerate(asked, 1):
        if case in known:
            continue
        print(f"{number} of {len(asked)}: {case.model}, {case.share}", file=sys.stderr)
        known[case] = outcome(case)
        with args.out.open("a") as file:
            file.write(line(case, known[case]))
    print(table({case: known[case] for case in asked}))


def cases(args: argparse.Namespace) -> Iterator[CacheCase]:
    for model, share in product(args.model, ("all", *map(str, args.budgets))):
        yield CacheCase(model, share, args.start, args.limit)


def outcome(case: CacheCase) -> CacheOutcome:
    exact, rounded = reroute_jax.load(case.model), reroute_jax.load(case.model, kv_cache="int8")
    schedule = exact.plan("none") if case.share == "all" else exact.plan("pdrop", budget=case.share)
    task = boxes(exact, case.start, case.questions)
    docs = list(task.docs(0))
    questions = [exact.question((doc.image, task.prompt(doc))) for doc in docs]
    how = {"schedule": schedule, "max_new_tokens": task.max_new_tokens, "batch_size": 32}
    answers = [model.answer(questions, **how) for model in (exact, rounded)]
    hits = [
        np.array([[scored(task, doc, answer.text)[BOXES]] for doc, answer in zip(docs, of, strict=True)])
        for of in answers
    ]
    labels = tuple(doc.cluster or doc.question_id for doc in docs)
    (minus,) = difference(hits[1], hits[0], Resampler(labels))
    return CacheOutcome(
        *(float(of.mean()) for of in hits),
        *(minus.value, minus.low, minus.high),
        alike=sum(one.token_ids == other.token_ids for one, other in zip(*answers, strict=True)),
        logits=logits_off(exact, rounded, questions[:FED], answers[0][:FED], schedule),
        exact_bytes=_mean_bytes(answers[0]),
        int8_bytes=_mean_bytes(answers[1]),
    )


def logits_off(
    exact: Model, rounded: Model, questions: Sequence[Question], answers: Sequence[Answer], schedule: Schedule
) -> float:
    """Relative error of the logits behind each token of the answers, mean over all of them."""
    steps = min(ROOM, max(len(answer.token_ids) for answer in answers))
    tokens = np.zeros((len(answers), steps), np.int32)
    fed = np.zeros(tokens.shape, bool)
    for row, answer in enumerate(answers):
        own = answer.token_ids[:steps]
        tokens[row, : len(own)], fed[row, : len(own)] = own, True
    wanted, found = (fed_logits(model, questions, tokens, schedule) for model in (exact, rounded))
    off = np.linalg.norm(found - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
    return float(off[fed].mean())


def fed_logits(model: Model, questions: Sequence[Question], tokens: np.ndarray, schedule: Schedule) -> np.ndarray:
    """`[B, steps, vocab]`, behind each of the tokens `[B, steps]`."""
    layouts = [lay_out(one, model.config, schedule) for one in questions]
    _, prefilled = run_prefill(model.weights, batch_of(layouts, model.files, schedule, len(layouts)))
    cache, live, logits = prefilled.cache, jnp.ones(len(tokens), bool), []
    step = jax.jit(decode_step)
    for token in tokens.T:
        found, cache = step(model.module.decoder, jnp.asarray(token), cache, live)
        logits.append(np.asarray(found))
    return np.stack(logits, axis=1)


def table(found: dict[CacheCase, CacheOutcome]) -> str:
    """Markdown."""
    lines = [
        "| model | visual tokens | ACC@0.5 | int8 | minus, points (95%) | answers alike | logits off by | kB | int8 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case, of in found.items():
        minus = "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * one for one in (of.minus, of.low, of.high)))
        lines.append(
            f"| {case.model} | {case.share} | {of.exact:.3f} | {of.int8:.3f} | {minus} |"
            f" {of.alike} of {case.questions} | {of.logits:.2%} |"
            f" {of.exact_bytes / 1e3:.0f} | {of.int8_bytes / 1e3:.0f} |"
        )
    return "\n".join(lines)


def _mean_bytes(answers: Sequence[Answer]) -> float:
    return float(np.mean([answer.usage.kv_bytes for answer in answers]))


def _parser() -> Parser:
    examples = (
        "--model scenes-llava --limit 100",
        "--model scenes-qwen --budgets 2/9 1/9",
        "--start 5000 --limit 1000",
    )
    parser = Parser("benchmarks.int8_cache", __doc__, examples)
    run, data, route, output = (parser.group(title) for title in (RUN, DATA, ROUTE, OUTPUT))
    run.add_argument("--model", nargs="+", choices=EMBEDDED, default=list(MODELS), help="(default: both)")
    data.add_argument("--start", type=whole, default=1000, help="first test scene (default: %(default)s)")
    data.add_argument("--limit", type=positive, default=200, help="questions (default: %(default)s)")
    route.add_argument(
        "--budgets", type=budget, nargs="*", default=["2/9"], help="beside all tokens (default: %(default)s)"
    )
    output.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/int8_cache.jsonl"), help="(default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
