"""What the runs of one command come to: a summary for machines, tables for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from evals.harness.boxes import RESIZED
from evals.harness.metrics import (
    CONFIDENCE,
    Estimate,
    Interval,
    Resampler,
    difference,
    estimator,
    matrix,
    means,
    retention,
)
from evals.harness.readability import shares, warnings
from evals.harness.routes import FULL, Routes
from evals.harness.runner import Answerer, Record, Task
from reroute_jax.errors import RerouteError
from reroute_jax.models import FAMILIES
from reroute_jax.routing.cost import Account, account
from reroute_jax.routing.plan import Schedule

TERA = 1e12
IDENTITY = "identity"  # the setting that holds digests and versions of all that a run depends on
HEADED = ("task", "questions", "data", "seed", "model", "dtype", "runs")  # settings with a place of their own
TABLE_WIDTH, INTERVAL_WIDTH = 150, 12  # characters: the metrics of a table, and a cell of most intervals
SHOWN = 10  # question_ids that the text names of those left out
RESIZED_NOTE = (
    "Above, pixels are divided by the stored image's size, as the reference does. Below (metrics named ..."
    f"{RESIZED}), by the size\nthat the model saw and answers in:"
)
COST_NOTE = (
    "TFLOPs: multiply-accumulates of the prefill, text included, as the papers count them (three-matrix MLP; the "
    "2-matrix form\nis FastV's); the scoring of the decisions and what a reduction before the decoder computes are in "
    "neither. KV bytes:\nafter the prefill."
)


@dataclass(frozen=True)
class Scored:
    """Runs over the same questions. columns: by run, one row a question, from whose means `estimate` makes the metrics
    called `names`. answered: by run, the records that count. questions: how many. left_out: question_ids by reason.
    """

    names: list[str]
    columns: Mapping[str, np.ndarray]
    estimate: Estimate
    resampler: Resampler
    answered: Mapping[str, list[Record]]
    questions: int
    left_out: dict[str, list[str]]


def summarise(
    records: Mapping[str, Sequence[Record]],
    routes: Routes,
    names: Sequence[str],
    model: Answerer,
    seed: int,
    task: Task,
) -> dict[str, Any]:
    """Metrics, cost, retention against the full run, and the differences asked for, with their intervals. JSON-able.

    records: by run, over the same questions in the same order. names: of the metrics; one that applies to no question
    and that the task does not derive is left out. Questions left out and noted are listed by reason. Each run has the
    shares of `readability.shares` under "answers", and what is wrong with many answers is under "warnings". Raises
    RerouteError where no question remains.
    """
    scored = score_runs(records, names, seed, task)
    names, scores, resampler, estimate = scored.names, scored.columns, scored.resampler, scored.estimate
    runs = {}
    for run in routes.runs:
        runs[run.name] = {
            "metrics": dict(zip(names, estimate(means(scores[run.name])).tolist(), strict=True)),
            "answers": shares(scored.answered[run.name]),
            "cost": mean_cost(run.schedule, model, scored.answered[run.name]),
        }
        if run.name != FULL:
            kept = retention(scores[run.name], scores[FULL], resampler, estimate)
            runs[run.name]["retention_percent"] = _named(names, kept)
    contrasts = {
        f"{first} minus {second}": _named(names, difference(scores[first], scores[second], resampler, estimate))
        for first, second in routes.contrasts
    }
    found = {
        "left_out": scored.left_out,
        "noted": _noted(scored.answered[FULL]),
        "warnings": [line for run, lines in scored.answered.items() for line in warnings(run, lines)],
    }
    counted = {"questions": scored.questions, **{name: what for name, what in found.items() if what}}
    return {**counted, "runs": runs, "differences": contrasts}


def _noted(records: Sequence[Record]) -> dict[str, list[str]]:
    """question_ids by what the task noted of them."""
    noted: dict[str, list[str]] = {}
    for record in records:
        if "noted" in record:
            noted.setdefault(record["noted"], []).append(record["question_id"])
    return noted


def score_runs(records: Mapping[str, Sequence[Record]], names: Sequence[str], seed: int, task: Task) -> Scored:
    """The finished records of all runs as columns of numbers; arguments and errors as of `summarise`."""
    finished = {run: task.finish(lines) for run, lines in records.items()}
    rows = list(zip(*finished.values(), strict=True))  # one a question, with the record of each run
    left_out: dict[str, list[str]] = {}
    for row in rows:
        reason = next((record["left_out"] for record in row if "left_out" in record), None)
        if reason is not None:
            left_out.setdefault(reason, []).append(row[0]["question_id"])
    kept = [row for row in rows if not any("left_out" in record for record in row)]
    if not kept:
        raise RerouteError(f"no question of {task.name} can be scored: all are left out ({', '.join(left_out)})")
    answered = {run: list(lines) for run, lines in zip(finished, zip(*kept, strict=True), strict=True)}
    columns = sorted({name for record in answered[FULL] for name in record["metrics"]})
    names = [name for name in names if name in columns or name in task.derived]
    estimate = estimator(columns, names, task.derived)
    scores = {run: matrix([record["metrics"] for record in lines], columns) for run, lines in answered.items()}
    labels = tuple(record.get("cluster", record["question_id"]) for record in answered[FULL])
    return Scored(names, scores, estimate, Resampler(labels, seed), answered, len(kept), left_out)


def mean_cost(schedule: Schedule, model: Answerer, records: Sequence[Record]) -> dict[str, Any]:
    """Cost of a question, averaged over `records`; compute in multiply-accumulates, as the papers count FLOPs."""
    sizes = Counter((tuple(record["visual_grid"]), record["text_tokens"]) for record in records)
    how = {"dtype": model.dtype, "tower": FAMILIES[model.config.family].tower_sizes(model.config)}
    accounts = [
        account(schedule, model.config.decoder, visual=grid[0] * grid[1], text=text, grid=grid, **how)
        for grid, text in sizes
    ]

    def mean(of: Callable[[Account], float]) -> float:
        return float(np.average([of(one) for one in accounts], weights=list(sizes.values())))

    return {
        "label": schedule.label,
        "visual_tokens": mean(lambda one: one.visual),
        "average_visual_tokens": mean(lambda one: one.average),
        "realised_budget": mean(lambda one: one.average) / mean(lambda one: one.visual),
        "nominal_visual_tokens": mean(lambda one: one.nominal),
        "kv_visual_tokens": mean(lambda one: one.kv_visual),
        "kv_tokens": mean(lambda one: one.kv_tokens),
        "kv_bytes": mean(lambda one: one.kv_bytes),
        "merging": mean(lambda one: one.merging),
        **{
            f"{part}_{form}": mean(lambda one, part=part, form=form: getattr(getattr(one, part), form))
            for part in ("prompt", "visual_only")
            for form in ("swiglu", "fastv", "gqa", "scoring")
        },
    }


def heading(summary: Mapping[str, Any], settings: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """What was run, as text: task, model, plans with their realised budgets, switches, versions and seed."""

    def listed(values: Mapping[str, Any]) -> str:
        return ", ".join(f"{name} {value}" for name, value in values.items())

    rest = {name: value for name, value in settings.items() if name != IDENTITY}
    task, questions, data, seed, model, dtype, plans = map(rest.pop, HEADED)
    rows = [("task", f"{task}, {questions} questions of {data}"), ("model", f"{model}, {dtype}")]
    for run, values in summary["runs"].items():
        cost = values["cost"]
        tokens = f"{cost['average_visual_tokens']:.2f} of {cost['visual_tokens']:.2f} visual tokens a layer"
        rows.append(("plan", f"{run}: {_decisions(plans[run])}, {tokens} ({cost['realised_budget']:.1%})"))
    rows += [("switches", listed(rest)), ("versions", listed(versions)), ("seed", str(seed))]
    return "\n".join(f"{title:<8}  {text}" for title, text in rows)


def _decisions(plan: Mapping[str, Any]) -> str:
    layers = [str(stage["lo"]) for stage in plan["stages"] if (stage["ratio"], stage["count"]) != (None, None)]
    return f"decides at layers {', '.join(layers)}" if layers else "no decision"


def render(summary: Mapping[str, Any], difference_scale: int = 100) -> str:
    """The tables of a summary, as text: means, retention, differences, and cost, after what was left out. Metrics of
    boxes in the frame that the model saw get tables of their own."""
    names = list(summary["runs"][FULL]["metrics"])
    resized = [name for name in names if name.endswith(RESIZED)]
    tables = [
        _listed_note("Left out, ", summary.get("left_out", {})),
        _listed_note("Noted: ", summary.get("noted", {})),
        "\n".join(f"Warning: {line}" for line in summary.get("warnings", ())),
    ]
    for few in _narrow([name for name in names if name not in resized]):
        tables += _metric_tables(summary, few, difference_scale)
    if resized:
        tables += [RESIZED_NOTE, *_metric_tables(summary, resized, difference_scale)]
    tables += [_answers_table(summary["runs"]), f"{_cost_table(summary['runs'])}\n{COST_NOTE}"]
    return "\n\n".join(text for text in tables if text)


def _narrow(names: Sequence[str]) -> list[list[str]]:
    """The names in groups whose columns fit a screen together."""
    groups: list[list[str]] = [[]]
    width = 0
    for name in names:
        column = max(len(name), INTERVAL_WIDTH) + 2
        if groups[-1] and width + column > TABLE_WIDTH:
            groups.append([])
            width = 0
        groups[-1].append(name)
        width += column
    return groups


def _listed_note(title: str, questions: Mapping[str, Sequence[str]]) -> str:
    def listed(found: Sequence[str]) -> str:
        return ", ".join(found[:SHOWN]) + (", ..." if len(found) > SHOWN else "")

    return "\n".join(
        f"{title}{reason}: {len(found)} (question_id {listed(found)})" for reason, found in questions.items()
    )


def _metric_tables(summary: Mapping[str, Any], names: Sequence[str], difference_scale: int) -> list[str]:
    runs = summary["runs"]
    columns = [name.removeprefix("refcoco_").removesuffix(RESIZED) for name in names]
    title = "difference" if difference_scale == 1 else f"difference x {difference_scale}"
    kept = {run: values["retention_percent"] for run, values in runs.items() if run != FULL}
    return [
        table(["mean", *columns], [[run, *(f"{v['metrics'][n]:.4f}" for n in names)] for run, v in runs.items()]),
        _interval_table([f"% of {FULL}", *columns], kept, names, "{:.1f}", 1),
        _interval_table([title, *columns], summary["differences"], names, "{:+.1f}", difference_scale),
    ]


def _answers_table(runs: Mapping[str, Any]) -> str:
    def cell(share: float | None) -> str:
        return "unknown" if share is None else f"{share:.1%}"

    rows = [[run, *(cell(values["answers"][what]) for what in ("unparsed", "cut_off"))] for run, values in runs.items()]
    return table(["answers", "unparsed", "cut off"], rows)


def _cost_table(runs: Mapping[str, Any]) -> str:
    header = [
        "cost per question",
        "visual tokens/layer",
        "nominal",
        "TFLOPs",
        "2-matrix form",
        "scoring adds",
        "merging adds",
        "KV bytes",
    ]
    rows = []
    for run, values in runs.items():
        cost = values["cost"]
        tera = [f"{cost[f'prompt_{form}'] / TERA:.4g}" for form in ("swiglu", "fastv", "scoring")]
        tokens = [f"{cost[f'{kind}_visual_tokens']:.2f}" for kind in ("average", "nominal")]
        # A finished run of an older version has none.
        merging = f"{cost['merging'] / TERA:.4g}" if "merging" in cost else "n/a"
        rows.append([run, *tokens, *tera, merging, f"{cost['kv_bytes']:.0f}"])
    return table(header, rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart: the first to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def _interval_table(
    header: Sequence[str], estimates: Mapping[str, Any], names: Sequence[str], form: str, scale: float
) -> str:
    """Two lines per estimate, itself and its interval, for the metrics in `names`; nothing without estimates."""

    def cell(*values: float | None) -> str:
        return "n/a" if None in values else "..".join(form.format(scale * value) for value in values)

    rows = []
    for title, found in estimates.items():
        metrics = [found[name] for name in names]
        rows.append([title, *(cell(metric["value"]) for metric in metrics)])
        rows.append([f"  {CONFIDENCE:.0%} interval", *(cell(metric["low"], metric["high"]) for metric in metrics)])
    return table(header, rows) if rows else ""


def _named(names: Sequence[str], intervals: Sequence[Interval]) -> dict[str, dict[str, float | None]]:
    return {name: asdict(interval) for name, interval in zip(names, intervals, strict=True)}
