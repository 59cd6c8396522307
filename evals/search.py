"""Find a schedule for a model and a budget, without labels. `python -m evals.search --help`.

Decisions, how many tokens each keeps, and what becomes of the others are changed until a schedule's answers stay
closest to those of all tokens on prompts of a calibration set. Fresh prompts then decide between what was found and the
best of the schedules that are set by hand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path
from statistics import median

from tqdm import tqdm

from convert.embedded import EMBEDDED
from evals.harness.cli import add_compat_argument, load_model
from evals.harness.data import SCENES
from evals.harness.report import table as text_table
from evals.searching.calibration import Calibration, ask, calibrate, kept_layers
from evals.searching.candidates import CONSTRAINTS, HAND_SET, Budget, Space, fitted, merge_of, spending, starting
from evals.searching.outcome import HEADER, outcome, row, visual_of
from evals.searching.search import OBJECTIVES, Effort, Ledger, Search
from evals.table import WITH_SCENES
from reroute_jax.commandline.loading import add_bits_arguments, add_mesh_argument, load_options
from reroute_jax.commandline.parsing import (
    DATA,
    OUTPUT,
    ROUTE,
    RUN,
    Parser,
    argument_of,
    exit_code,
    positive,
    positive_number,
    whole,
)
from reroute_jax.engine.compilation import keep_programs
from reroute_jax.engine.model import Model
from reroute_jax.errors import RerouteError
from reroute_jax.routing.budget import parsed_budget, share_of
from reroute_jax.routing.merge import Merge
from reroute_jax.types import FLOATS

GIGA = 10**9


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: _run(args), args.debug, "stopped before anything was found")


def _parser() -> Parser:
    examples = (
        "--model scenes-qwen --budget 2/9 --out schedule.json",
        "--budget 1/3,2/9,1/9 --seeds 3 --out found.json",
        "--budget 2/9 --behind divprune:1/2 --out schedule.json",
    )
    parser = Parser("evals.search", "Find when to decide and how many tokens to keep, without labels.", examples)
    run, data, route, output = (parser.group(title) for title in (RUN, DATA, ROUTE, OUTPUT))
    run.add_argument(
        "--model",
        default=EMBEDDED[0],
        help=f"hub id, folder in HF format, converted folder, or one of {', '.join(EMBEDDED)} (default: %(default)s)",
    )
    run.add_argument("--dtype", choices=tuple(FLOATS), help="as of the other commands")
    add_mesh_argument(parser)
    add_bits_arguments(parser)
    run.add_argument("--batch-size", type=positive, default=32, help="prompts at a time (default: %(default)s)")
    run.add_argument("--seed", type=whole, default=0, help="of the first search (default: %(default)s)")
    run.add_argument("--seeds", type=positive, default=1, help="searches, the best one counts (default: %(default)s)")
    run.add_argument(
        "--rounds",
        type=positive,
        default=12,
        help="of a search, for each budget; the same rounds find the same (default: %(default)s)",
    )
    run.add_argument(
        "--minutes",
        type=positive_number,
        default=10,
        help="after which a search starts no more rounds of a budget: with --seeds 3 and two budgets six times as many "
        "at most, beside asking the prompts before and comparing on fresh ones after (default: %(default)s)",
    )
    run.add_argument(
        "--memory",
        type=positive_number,
        default=2,
        metavar="GB",
        help="for hidden states of all tokens, so that fewer layers run again (default: %(default)s)",
    )
    run.add_argument("--compilation-cache", type=Path, metavar="DIR", help="keep compiled programs there")
    data.add_argument(
        "--tasks",
        type=_tasks,
        default=("refcoco",),
        metavar="A,B",
        help=f"whose prompts, of {', '.join(WITH_SCENES)} (default: refcoco)",
    )
    data.add_argument("--data", default=SCENES, help="as of the other commands (default: %(default)s)")
    data.add_argument("--split", default="val", help="(default: %(default)s)")
    data.add_argument(
        "--limit", type=positive, default=256, help="prompts of all tasks together (default: %(default)s)"
    )
    data.add_argument(
        "--fresh-prompts",
        type=positive,
        default=128,
        help="more of them, which decide in the end whether what was "
        "found is better than what is set by hand (default: %(default)s)",
    )
    route.add_argument(
        "--budget", type=_budgets, required=True, metavar="B,C", help="192, 128, 64 or shares, as of the other commands"
    )
    route.add_argument(
        "--behind",
        metavar="METHOD:SHARE",
        help="search behind a reduction before the decoder, such as divprune:1/2; what is set by hand stands behind it "
        "as well (default: none)",
    )
    route.add_argument(
        "--constraint",
        choices=CONSTRAINTS,
        default="tokens",
        help="what the budget is a share of: visual tokens over "
        "all layers; multiply-accumulates of the prefill with scoring, or KV bytes, text included in both "
        "(default: %(default)s)",
    )
    route.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="mean",
        help="of all prompts, or of the task that fares worst (default: %(default)s)",
    )
    add_compat_argument(parser)
    output.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="the schedule, for --schedule; of several budgets FILE_1-9.json and so on",
    )
    return parser


def _tasks(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in WITH_SCENES:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(WITH_SCENES)}")
    return names


@argument_of
def _budgets(text: str) -> tuple[Fraction, ...]:
    return tuple(dict.fromkeys(share_of(parsed_budget(part), 10**6) for part in text.split(",")))


def _run(args: argparse.Namespace) -> None:
    if args.compilation_cache is not None:
        keep_programs(args.compilation_cache)
    if not args.out.parent.is_dir():
        raise RerouteError(f"there is no folder {args.out.parent} for --out: make it")
    for file in (_file(args, share) for share in args.budget):
        if file.is_dir():
            raise RerouteError(f"{file} is a folder: give a file as --out")
    if args.kv_cache is not None:
        raise RerouteError("schedules are simulated, which reads no KV cache: leave out --kv-cache")
    model = load_model(args.model, args.dtype, args.mrope_compat, **load_options(args))
    space = Space.of(model, None if args.behind is None else merge_of(model, args.behind))
    _check_room(args, space)
    calibration, fresh = _prompts(args, model, space.merge)
    text = round(median(len(one.question.ids) - visual_of(one.question) for one in calibration.asked))
    spent = spending(model, space, args.constraint, text)
    budgets = {share: Budget(share, spent) for share in args.budget}
    by_hand = {share: fitted(model, HAND_SET, space, budget) for share, budget in budgets.items()}
    starts = {share: starting(model, space, budgets[share], by_hand[share]) for share in budgets}
    for share in (share for share, found in by_hand.items() if not found):
        print(f"{share}: no schedule that is set by hand fits, so that what is found is compared with none", flush=True)
    ledger, fresh = (Ledger(space, prompts, args.objective) for prompts in (calibration, fresh))
    for searches in _searched(args, ledger, budgets, starts):
        outcomes = {}
        for share, budget in budgets.items():
            schedule, about = outcome(args, model, ledger, fresh, searches, budget, by_hand[share], text)
            schedule.to_file(_file(args, share), about)
            outcomes[share] = about
    print(text_table(HEADER, [row(share, about) for share, about in outcomes.items()]))
    print(f"\nFor --schedule: {', '.join(str(_file(args, share)) for share in budgets)}")


def _check_room(args: argparse.Namespace, space: Space) -> None:
    """Raises RerouteError where a merge alone leaves no more than a budget."""
    left = Fraction(space.num_layers * space.visual, space.token_layers)
    if args.behind is not None and (over := [share for share in args.budget if share >= left]):
        raise RerouteError(
            f"behind {args.behind} {left} of the tokens are left, and the budget is {over[0]}: lower --budget, or let "
            "--behind leave more"
        )


def _prompts(args: argparse.Namespace, model: Model, merge: Merge | None) -> tuple[Calibration, Calibration]:
    """Those that are searched on, and fresh ones, of all tasks in turn."""
    each = [-(-number // len(args.tasks)) for number in (args.limit, args.fresh_prompts)]
    found = [list(_questions(name, sum(each), args, model)) for name in args.tasks]
    for name, questions in zip(args.tasks, found, strict=True):
        if len(questions) < sum(each):
            raise RerouteError(
                f"{name} has {len(questions)} prompts for {sum(each)} that --limit and --fresh-prompts ask for"
            )
    in_turn = [one for several in zip(*found, strict=True) for one in several]
    print(f"asking {model.folder.name} {len(in_turn)} prompts with all tokens", flush=True)
    asked = ask(model, in_turn, args.batch_size)
    first = each[0] * len(args.tasks)
    slots = max(len(one.question.ids) for one in asked) + len(max((one.answer for one in asked), key=len))
    kept = kept_layers(model, len(asked), slots, int(args.memory * GIGA))
    print(f"keeping hidden states before {len(kept)} of {model.config.num_layers} layers", flush=True)
    with tqdm(total=len(asked), unit="prompt") as bar:
        return tuple(
            calibrate(model, part, args.batch_size, kept, bar.update, merge) for part in (asked[:first], asked[first:])
        )


def _questions(name: str, count: int, args: argparse.Namespace, model: Model):
    """(question, task, cluster) of a task's first prompts."""
    command = WITH_SCENES[name]
    own = command.parser().parse_args([])
    for given in ("data", "split", "model", "dtype", "mrope_compat", "batch_size", "seed"):
        setattr(own, given, getattr(args, given))
    own.limit = count
    task, _, _ = command.questions(own, command.source(own), model)
    for doc in tqdm(islice(task.docs(0), count), total=count, desc=name, unit="prompt", leave=False):
        yield model.question((doc.image, task.prompt(doc))), name, f"{name} {doc.cluster or doc.question_id}"


def _searched(args: argparse.Namespace, ledger: Ledger, budgets, starts) -> Iterator[list[Search]]:
    """Searches with one seed after the other: all so far, after each. Ctrl-C ends the last one, and what was found
    counts where every budget has something."""
    effort, searches = Effort(args.rounds, 60 * args.minutes), []
    visits = args.seeds * len(budgets)
    print(
        f"seeds: {args.seeds}, budgets: {len(budgets)}, rounds of each: {args.rounds}; none starts after "
        f"{args.minutes:g} minutes of each, so some {visits * args.minutes:g} minutes at most",
        flush=True,
    )
    with tqdm(total=args.seeds * len(budgets) * args.rounds, unit="round") as bar:

        def told(share: Fraction, best: float) -> None:
            bar.set_description(f"seed {searches[-1].seed}, {share}: best {best:.4f} of {len(ledger.screens)} tried")
            bar.update()

        for number in range(args.seeds):
            searches.append(Search(ledger, budgets, starts, args.seed + number))
            try:
                searches[-1].run(effort, told)
            except KeyboardInterrupt:
                if not all(any(share in search.pool for search in searches) for share in budgets):
                    raise
                searches[-1].stopped = dict.fromkeys(searches[-1].pool, "Ctrl-C")
                tqdm.write("stopped: keeping the best so far")
                yield searches
                return
            yield searches


def _file(args: argparse.Namespace, share: Fraction) -> Path:
    """--out, or of several budgets FILE_1-9.json."""
    if len(args.budget) == 1:
        return args.out
    return args.out.with_name(f"{args.out.stem}_{share.numerator}-{share.denominator}{args.out.suffix}")


if __name__ == "__main__":
    sys.exit(main())
