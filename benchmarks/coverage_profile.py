"""Whether the layers where a decision would see most of what is read later are where a search should start.

    python -m benchmarks.coverage_profile --model scenes-qwen

The coverage of a layer, over one pass with all tokens: of the attention that a prompt's last token and its answer pay
to visual tokens in this and all later layers, what goes to the best of this layer's own score, as a share of what
equally many tokens can get at most. A search that starts from decisions at its peaks runs beside the ordinary one, and
one that starts from both, with the same seeds and rounds. Differences are those to the ordinary one on fresh prompts.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from functools import partial
from statistics import fmean
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from benchmarks.found_schedules import add_run_arguments, boxes
from evals.harness.cli import load_model
from evals.harness.identity import versions
from evals.searching.calibration import Calibration, ask, calibrate
from evals.searching.candidates import HAND_SET, Budget, Candidate, Space, fitted, repaired, spending, starting
from evals.searching.outcome import shown
from evals.searching.search import DECIDED, Effort, Ledger, Search, gate
from evals.table import listed
from reroute_jax.commandline.parsing import DATA, ROUTE, RUN, Parser, budget, exit_code, positive
from reroute_jax.engine.compilation import compiled, keep_programs
from reroute_jax.engine.model import Model
from reroute_jax.nn.layers import DecoderLayer
from reroute_jax.routing.budget import share_of
from reroute_jax.routing.found import FOUND, found_file
from reroute_jax.routing.ops import Rows

TOP = 8  # tokens whose coverage counts
DECISIONS = (2, 3, 4)  # of a start that is made of the profile
BY_HAND, PROFILE, BOTH = "by hand", "profile", "both"


def calibrations(
    model: Model, limit: int, fresh: int, batch_size: int, kept: Sequence[int]
) -> tuple[Calibration, Calibration]:
    """The first prompts of the validation scenes, as `evals.search` takes them: those that are searched on, and fresh
    ones. kept: as of `simulator.start`."""
    task = boxes(model, 0, limit + fresh, "val")
    questions = [
        (model.question((doc.image, task.prompt(doc))), "refcoco", doc.cluster or doc.question_id)
        for doc in task.docs(0)
    ]
    asked = ask(model, questions, batch_size)
    with tqdm(total=len(asked), unit="prompt") as bar:
        parts = (asked[:limit], kept), (asked[limit:], (0,))
        return tuple(calibrate(model, part, batch_size, layers, bar.update) for part, layers in parts)


def profile_of(calibration: Calibration) -> Float[np.ndarray, " L"]:
    """Mean coverage of each layer. Its input must have been kept."""
    found = []
    for chunk, counted in zip(calibration.chunks, calibration.counted, strict=True):
        attention = [
            _attention(layer, replace(chunk.rows, hidden=chunk.hidden[at]), chunk.last, counted, slots=chunk.forced + 1)
            for at, layer in enumerate(chunk.decoder.layers)
        ]
        scores, paid = (np.array(part) for part in zip(*attention, strict=True))
        found.append(coverage(scores, paid))
    return np.concatenate(found, axis=1).mean(axis=1)


@compiled(static_argnames="slots")
def _attention(
    layer: DecoderLayer, rows: Rows, last: Int[Array, " B"], counted: Int[Array, " B"], slots: int
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """What the prompt's last token pays to each visual token, mean over heads, and what it and the forced tokens that
    count pay together; 0 to all else."""
    tokens = last[:, None] + jnp.arange(slots)
    mask = jnp.arange(rows.valid.shape[1]) <= tokens[..., None]
    probabilities, _ = layer.probabilities(rows.hidden, rows.rope, tokens, mask)
    paid = jnp.where(rows.eligible[:, None], probabilities.mean(axis=1), 0)
    return paid[:, 0], (paid * (jnp.arange(slots) < counted[:, None])[..., None]).sum(axis=1)


def coverage(scores: Float[np.ndarray, "L B T"], paid: Float[np.ndarray, "L B T"]) -> Float[np.ndarray, "L B"]:
    """What the TOP best of each layer's scores are paid in this and all later layers, over what TOP tokens can be."""
    ahead = paid[::-1].cumsum(axis=0)[::-1]
    best = np.argsort(-scores, axis=-1, kind="stable")[..., :TOP]
    return np.take_along_axis(ahead, best, axis=-1).sum(axis=-1) / np.sort(ahead, axis=-1)[..., -TOP:].sum(axis=-1)


def peaks(profile: Sequence[float]) -> list[int]:
    """Layers that no neighbour is above, best first."""
    edged = [-math.inf, *profile, -math.inf]
    found = [at for at, value in enumerate(profile) if value >= max(edged[at], edged[at + 2])]
    return sorted(found, key=lambda at: -profile[at])


def shapes(profile: Sequence[float], space: Space, limit: Budget) -> list[Candidate]:
    """Decisions at the best peaks, with counts that spend the budget: equal ones that reroute, and halves that delete,
    since equal ones would delete nothing. The first is at the best layer that the budget lets be the first, as all
    tokens run before it."""
    reached = [at for at in range(space.num_layers) if limit.holds(Candidate((at,), (1,), ("delete",)))]
    first = max(reached, key=lambda at: profile[at])
    behind = [at for at in peaks(profile) if at > first]
    made = []
    for layers in ((first, *sorted(behind[: count - 1])) for count in DECISIONS):
        halves = tuple(2 ** (len(layers) - at) for at in range(len(layers)))
        made.append(Candidate(layers, halves, ("delete",) * len(layers)))
        made.append(Candidate(layers, (1,) * len(layers), ("reroute",) * len(layers)))
    return list(dict.fromkeys(found for one in made if (found := repaired(one, space, limit)) is not None))


def searched(
    ledger: Ledger, limit: Budget, starts: Sequence[Candidate], seed: int, rounds: int, done: Callable[[], Any]
) -> Candidate:
    """The best of a search by its prompts. done: is called after each round."""
    search = Search(ledger, {limit.share: limit}, {limit.share: starts}, seed)
    search.run(Effort(rounds, math.inf), lambda share, best: done())
    return search.pool[limit.share][0]


def told_of(ledger: Ledger, fresh: Ledger, candidate: Candidate) -> dict[str, Any]:
    worth = {"calibration": ledger.decide(candidate), "fresh": fresh.decide(candidate)}
    return {"schedule": str(candidate), **worth}


def compared(
    ledger: Ledger, fresh: Ledger, starts: Mapping[str, Sequence[Candidate]], search: Callable, seeds: int
) -> dict[str, dict[str, Any]]:
    """Of every kind of start the best one and what searches from there found. search: (starts, seed) -> candidate.
    minus: divergence on the fresh prompts, of each the mean over the seeds, minus that of the first kind."""
    told, values, clusters = {}, {}, [one.cluster for one in fresh.calibration.asked]
    for name, own in starts.items():
        found = [search(own, seed) for seed in range(seeds)]
        values[name] = np.mean([fresh.divergences(one) for one in found], axis=0)
        told[name] = {
            "starts": [str(one) for one in own],
            "best_start": told_of(ledger, fresh, ledger.best(own, 2 * DECIDED, 1)[0]),
            "found": [told_of(ledger, fresh, one) for one in found],
            "minus": asdict(gate(values[name], values[next(iter(starts))], clusters, seed=0)),
        }
    return told


def markdown(about: Mapping[str, Any]) -> str:
    """Two tables a person can read. Of divergences the mean over the seeds, and each."""
    decided = [dict(part.split(":") for part in schedule.split()) for schedule in about["found"].values()]
    header = ["layer", "coverage", *(f"found {share}" for share in about["found"])]
    rows = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for at, value in enumerate(about["profile"]):
        cells = [str(at), f"{value:.2f}{' peak' * (at in about['peaks'])}", *(one.get(str(at), "") for one in decided)]
        rows.append(f"| {' | '.join(cells)} |")
    rows += ["", "| budget | starts | best start | calibration | fresh | minus by hand (95%) |", "|---" * 6 + "|"]
    for share, kinds in about["searches"].items():
        for name, kind in kinds.items():
            start = "`{schedule}` {calibration:.3f}".format(**kind["best_start"])
            worth = [[one[part] for one in kind["found"]] for part in ("calibration", "fresh")]
            cells = [f"{fmean(each):.3f}: {', '.join(f'{one:.3f}' for one in each)}" for each in worth]
            cells.append(shown(kind["minus"]) if name != BY_HAND else "")
            rows.append(f"| {share} | {name} | {start} | {' | '.join(cells)} |")
    return "\n".join(rows)


def measure(args) -> None:
    if args.compilation_cache is not None:
        keep_programs(args.compilation_cache)
    model = load_model(args.model, None)
    space = Space.of(model, None)
    calibration, fresh = calibrations(model, args.limit, args.fresh_prompts, args.batch_size, range(space.num_layers))
    profile = profile_of(calibration).tolist()
    about = {
        "model": args.model,
        "prompts": {"calibration": args.limit, "fresh": args.fresh_prompts},
        "rounds": args.rounds,
        "profile": profile,
        "peaks": peaks(profile),
        "found": {},
        "searches": {},
        "versions": versions(),
    }
    ledger, fresh_ledger = Ledger(space, calibration), Ledger(space, fresh)
    with tqdm(total=3 * len(args.budgets) * args.seeds * args.rounds, unit="round") as bar:
        for share in (share_of(each, 10**6) for each in args.budgets):
            limit = Budget(share, spending(model, space, "tokens", 0))
            by_hand = starting(model, space, limit, fitted(model, HAND_SET, space, limit))
            made = shapes(profile, space, limit)
            starts = {BY_HAND: by_hand, PROFILE: made, BOTH: [*by_hand, *made]}
            if found_file(model.folder, share).is_file():
                about["found"][str(share)] = str(space.candidate(model.plan(FOUND, budget=share)))
            search = partial(searched, ledger, limit, rounds=args.rounds, done=bar.update)
            about["searches"][str(share)] = compared(ledger, fresh_ledger, starts, search, args.seeds)
    args.out.mkdir(parents=True, exist_ok=True)
    shares = "_".join(share.replace("/", "-") for share in about["searches"])
    (args.out / f"coverage_{args.model}_{shares}.json").write_text(json.dumps(about, indent=1) + "\n")
    print(markdown(about))


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return exit_code(lambda: measure(args), args.debug, "stopped before the last search ended: nothing is kept")


def _parser() -> Parser:
    examples = ("", "--model scenes-qwen --budgets 1/3,2/9,1/9", "--limit 64 --seeds 1 --rounds 1 --out runs")
    parser = Parser("benchmarks.coverage_profile", __doc__.splitlines()[0], examples)
    add_run_arguments(parser)
    run, data, route = parser.group(RUN), parser.group(DATA), parser.group(ROUTE)
    run.add_argument("--seeds", type=positive, default=3, help="searches of each kind (default: %(default)s)")
    run.add_argument("--rounds", type=positive, default=4, help="of a search (default: %(default)s)")
    data.add_argument("--limit", type=positive, default=128, help="prompts to search on (default: %(default)s)")
    data.add_argument("--fresh-prompts", type=positive, default=128, help="(default: %(default)s)")
    route.add_argument(
        "--budgets",
        type=partial(listed, budget),
        default=(Fraction(2, 9),),
        metavar="A,B",
        help="shares, or 192, 128, 64 (default: 2/9)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
