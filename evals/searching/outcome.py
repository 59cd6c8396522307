"""What a search comes to for a budget: the schedule that is kept, and what its file and the table say of it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from convert.embedded import locate
from evals.harness.identity import checkpoint_identity, versions
from evals.harness.metrics import Interval
from evals.searching.calibration import task_means
from evals.searching.candidates import Budget, Candidate
from evals.searching.search import Ledger, Search, gate
from reroute_jax.commandline.loading import load_options
from reroute_jax.engine.batching import Question
from reroute_jax.engine.model import Model
from reroute_jax.routing.cost import visual_per_layer
from reroute_jax.routing.plan import Schedule

HEADER = ("budget", "schedule", "spent", "tokens/layer", "calibration", "fresh", "by hand", "difference (95%)", "kept")


def outcome(
    args: argparse.Namespace,
    model: Model,
    ledger: Ledger,
    fresh: Ledger,
    searches: Sequence[Search],
    budget: Budget,
    by_hand: Sequence[Candidate],
    text: int,
) -> tuple[Schedule, dict[str, Any]]:
    """Decide on fresh prompts: the schedule that is kept, and what its file tells beside it. by_hand: those that fit
    the budget; without any, what was found is kept."""
    share = budget.share
    found = [search for search in searches if share in search.pool]
    best = min(found, key=lambda search: ledger.decide(search.pool[share][0]))
    candidate, hand_set = best.pool[share][0], min(by_hand, key=ledger.decide, default=None)
    interval = None if hand_set is None else _compared(candidate, hand_set, fresh, args.seed)
    won = interval is None or (interval.high is not None and interval.high < 0)
    kept, said = (candidate, "found") if won else (hand_set, "hand-set")
    schedule = ledger.space.schedule(kept, f"{said} {share}")
    return schedule, {
        "kept": said,
        "budget": str(share),
        "constraint": args.constraint,
        "behind": args.behind,
        "objective": {
            "over": args.objective,
            "calibration": ledger.decide(candidate),
            "calibration_hand_set": None if hand_set is None else ledger.decide(hand_set),
        },
        "fresh": {
            "found": fresh.decide(candidate),
            "hand_set": None if hand_set is None else fresh.decide(hand_set),
            "found_minus_hand_set": None if interval is None else asdict(interval),
            "tasks": task_means(fresh.divergences(candidate), fresh.calibration.tasks),
        },
        "hand_set": None if hand_set is None else str(hand_set),
        "searches": [_told(search, share, ledger, fresh) for search in found],
        "best_search": found.index(best),
        "tried": len(ledger.screens),
        "rounds": args.rounds,
        "minutes": args.minutes,
        "cost": _cost(model, schedule, ledger, text) | {"spent": float(budget.spent(kept))},
        "model": args.model,
        "dtype": str(model.dtype),
        **load_options(args),
        **checkpoint_identity(Path(locate(args.model)).expanduser(), model.folder),
        "tasks": list(args.tasks),
        "data": args.data,
        "split": args.split,
        "prompts": {"calibration": len(ledger.calibration.asked), "fresh": len(fresh.calibration.asked)},
        "versions": versions(),
    }


def row(share: Fraction, about: Mapping[str, Any]) -> list[str]:
    """A budget's cells under `HEADER`."""
    fresh, interval = about["fresh"], about["fresh"]["found_minus_hand_set"]
    return [
        str(share),
        about["searches"][about["best_search"]]["schedule"],
        f"{about['cost']['spent']:.4f}",
        f"{about['cost']['average_visual_tokens']:.2f}",
        f"{about['objective']['calibration']:.4f}",
        f"{fresh['found']:.4f}",
        "none fits" if interval is None else f"{fresh['hand_set']:.4f}",
        "" if interval is None else shown(interval),
        about["kept"],
    ]


def shown(interval: Mapping[str, float | None]) -> str:
    """A difference of divergences; without its bounds where they are not known, as of one prompt."""
    bounds = "" if interval["low"] is None else " ({low:+.4f} to {high:+.4f})".format(**interval)
    return f"{interval['value']:+.4f}{bounds}"


def _left(schedule: Schedule, question: Question) -> int:
    """Visual tokens of a question at the decoder's input."""
    return sum(schedule.merged_count(rows * cols, (rows, cols)) for rows, cols in question.grids)


def visual_of(question: Question) -> int:
    """Visual tokens of a question."""
    return sum(rows * cols for rows, cols in question.grids)


def _compared(candidate: Candidate, hand_set: Candidate, fresh: Ledger, seed: int) -> Interval:
    clusters = [one.cluster for one in fresh.calibration.asked]
    return gate(fresh.divergences(candidate), fresh.divergences(hand_set), clusters, seed)


def _told(search: Search, share: Fraction, ledger: Ledger, fresh: Ledger) -> dict[str, Any]:
    best = search.pool[share][0]
    return {
        "seed": search.seed,
        "schedule": str(best),
        **asdict(best),
        "calibration": ledger.decide(best),
        "fresh": fresh.decide(best),
        "tried": len(search.tried),
        "stopped": search.stopped[share],
    }


def _cost(model: Model, schedule: Schedule, ledger: Ledger, text: int) -> dict[str, Any]:
    """Of the reference image with `text` tokens beside it, and what calibration's images really ran."""
    one = model.cost(schedule, text=text)
    questions = [asked.question for asked in ledger.calibration.asked]
    sizes = [visual_of(one) for one in questions]
    layers = [sum(visual_per_layer(schedule, _left(schedule, one))) / model.config.num_layers for one in questions]
    return {
        "text_tokens": text,
        "average_visual_tokens": one.average,
        "average_on_calibration": float(np.mean(layers)),
        "share_on_calibration": float(np.sum(layers) / np.sum(sizes)),
        "prefill_macs": one.prompt.swiglu,
        "scoring_macs": one.prompt.scoring,
        "merging_macs": one.merging,
        "kv_bytes": one.kv_bytes,
    }
