"""What int8 and int4 weights and an int8 KV cache change, against the same model without. `python -m
benchmarks.fewer_bits --help`.

Both answer the same referring expressions, with all tokens and under PDrop with reroute. Beside how often the boxes are
right: how many answers have the same tokens, how many of the tokens that a decision selects are the same, how far the
logits are off while both are fed the exact model's tokens, and the bytes of a question's cache. A run that was cut off
goes on where it was. Quantised weights need qwix.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

import reroute_jax
from benchmarks.found_schedules import BOXES, boxes, points, scored
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
from reroute_jax.engine.trace import Trace
from reroute_jax.nn.cache import ROOM
from reroute_jax.routing.plan import Schedule

MODELS = ("scenes-llava", "scenes-qwen")
# What is held in fewer bits, as `load` takes it.
HELD = {
    "int8": {"quantise": "int8"},
    "int4": {"quantise": "int4"},
    "int8-cache": {"kv_cache": "int8"},
    "int8+int8-cache": {"quantise": "int8", "kv_cache": "int8"},
}
FED = 8  # questions whose selections and logits are compared


@dataclass(frozen=True)
class BitsCase:
    """share: of the visual tokens that run, "all" for a run that is not routed. held: of HELD. start: the first test
    scene."""

    model: str
    share: str
    held: str
    start: int
    questions: int


@dataclass(frozen=True)
class BitsOutcome:
    """exact, fewer: ACC@0.5. minus, low, high: of fewer minus exact, with a paired 95% interval. alike: answers with
    the same tokens. selected: share of the same tokens in each decision. logits: by how much of their length they are
    off, mean over all steps behind the prefill. exact_bytes, fewer_bytes: of a question's cache with its answer, mean.
    """

    exact: float
    fewer: float
    minus: float
    low: float | None
    high: float | None
    alike: int
    selected: list[float]
    logits: float
    exact_bytes: float
    fewer_bytes: float


@dataclass(frozen=True)
class Answered:
    """By one model. clusters: of the questions, for intervals. hits: 1 where the box is right, a row a question."""

    model: Model
    schedule: Schedule
    questions: list[Question]
    clusters: tuple[str, ...]
    answers: list[Answer]
    hits: Float[np.ndarray, "questions 1"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 after one line on bad input."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: compare(args), args.debug, "stopped: the same command goes on behind the last whole line")


def compare(args: argparse.Namespace) -> None:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    known, asked = read(args.out, BitsCase, BitsOutcome), list(cases(args))
    todo = [case for case in asked if case not in known]
    with tqdm(total=len(todo), unit="case") as bar, args.out.open("a") as file:
        for case, found in outcomes(todo):
            known[case] = found
            file.write(line(case, found))
            file.flush()
            bar.update()
    print(table({case: known[case] for case in asked}))


def cases(args: argparse.Namespace) -> Iterator[BitsCase]:
    """Those with the same exact answers together."""
    for model, share, held in product(args.model, ("all", *map(str, args.budgets)), args.held):
        yield BitsCase(model, share, held, args.start, args.limit)


def outcomes(todo: Sequence[BitsCase]) -> Iterator[tuple[BitsCase, BitsOutcome]]:
    for plain, group in groupby(todo, lambda case: replace(case, held="")):
        exact = answered(reroute_jax.load(plain.model), plain)
        for case in group:
            yield case, outcome(exact, answered(reroute_jax.load(case.model, **HELD[case.held]), case))


def answered(model: Model, case: BitsCase) -> Answered:
    schedule = model.plan("none") if case.share == "all" else model.plan("pdrop", budget=case.share)
    task = boxes(model, case.start, case.questions)
    docs = list(task.docs(0))
    questions = [model.question((doc.image, task.prompt(doc))) for doc in docs]
    answers = model.answer(questions, schedule=schedule, max_new_tokens=task.max_new_tokens, batch_size=32)
    hits = [[scored(task, doc, answer.text)[BOXES]] for doc, answer in zip(docs, answers, strict=True)]
    clusters = tuple(doc.cluster or doc.question_id for doc in docs)
    return Answered(model, schedule, questions, clusters, answers, np.array(hits))


def outcome(exact: Answered, fewer: Answered) -> BitsOutcome:
    (minus,) = difference(fewer.hits, exact.hits, Resampler(exact.clusters))
    return BitsOutcome(
        exact=float(exact.hits.mean()),
        fewer=float(fewer.hits.mean()),
        minus=minus.value,
        low=minus.low,
        high=minus.high,
        alike=sum(one.token_ids == other.token_ids for one, other in zip(exact.answers, fewer.answers, strict=True)),
        selected=selected_alike(exact, fewer),
        logits=logits_off(exact, fewer),
        exact_bytes=_mean_bytes(exact.answers),
        fewer_bytes=_mean_bytes(fewer.answers),
    )


def selected_alike(exact: Answered, fewer: Answered) -> list[float]:
    """Of each decision, how many of the tokens that the exact model selects are selected, mean over questions."""
    traced = [_traced(one) for one in (exact, fewer)]
    shares = [
        [shared(*pair) for pair in zip(one.selected, other.selected, strict=True)]
        for one, other in zip(*traced, strict=True)
    ]
    return np.mean(shares, axis=0).tolist()


def _traced(one: Answered) -> list[Trace]:
    answers = one.model.answer(one.questions[:FED], schedule=one.schedule, max_new_tokens=1, trace=True)
    return [answer.trace for answer in answers]


def shared(one: np.ndarray, other: np.ndarray) -> float:
    """The share of the tokens of `one`, `[1, k]` padded by -1, that stand in `other`."""
    return float(np.isin(one[one >= 0], other).mean())


def logits_off(exact: Answered, fewer: Answered) -> float:
    """Relative error of the logits behind each token of the exact model's answers, mean over all of them."""
    answers = exact.answers[:FED]
    steps = min(ROOM, max(len(answer.token_ids) for answer in answers))
    tokens = np.zeros((len(answers), steps), np.int32)
    fed = np.zeros(tokens.shape, bool)
    for row, answer in enumerate(answers):
        own = answer.token_ids[:steps]
        tokens[row, : len(own)], fed[row, : len(own)] = own, True
    wanted, found = (fed_logits(one.model, one.questions[:FED], tokens, one.schedule) for one in (exact, fewer))
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


def table(found: dict[BitsCase, BitsOutcome]) -> str:
    """Markdown."""
    lines = [
        "| model | visual tokens | in fewer bits | ACC@0.5 | so | difference, points (95%) | same answers"
        " | selected alike, % | logits off by | cache of a question, kB | so |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, of in found.items():
        minus = points({"value": of.minus, "low": of.low, "high": of.high}, "+")
        selected = " ".join(f"{100 * share:.1f}" for share in of.selected)
        lines.append(
            f"| {case.model} | {case.share} | {case.held} | {of.exact:.3f} | {of.fewer:.3f} | {minus} |"
            f" {of.alike} of {case.questions} | {selected} | {of.logits:.2%} |"
            f" {of.exact_bytes / 1e3:.0f} | {of.fewer_bytes / 1e3:.0f} |"
        )
    return "\n".join(lines)


def _mean_bytes(answers: Sequence[Answer]) -> float:
    return float(np.mean([answer.usage.kv_bytes for answer in answers]))


def _parser() -> Parser:
    examples = (
        "--model scenes-llava --held int8-cache --limit 100",
        "--model scenes-qwen --held int8 int8+int8-cache --budgets 2/9 1/9",
        "--start 5000 --limit 1000",
    )
    parser = Parser("benchmarks.fewer_bits", __doc__, examples)
    run, data, route, output = (parser.group(title) for title in (RUN, DATA, ROUTE, OUTPUT))
    run.add_argument("--model", nargs="+", choices=EMBEDDED, default=list(MODELS), help="(default: both)")
    run.add_argument(
        "--held", nargs="+", choices=tuple(HELD), default=list(HELD), help="what is held in fewer bits (default: all)"
    )
    data.add_argument("--start", type=whole, default=1000, help="first test scene (default: %(default)s)")
    data.add_argument("--limit", type=positive, default=200, help="questions (default: %(default)s)")
    route.add_argument(
        "--budgets", type=budget, nargs="*", default=["2/9"], help="beside all tokens (default: %(default)s)"
    )
    output.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/fewer_bits.jsonl"), help="(default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
