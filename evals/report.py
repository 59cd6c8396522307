"""What the runs of one command come to: a summary for machines, tables for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from evals.boxes import RESIZED
from evals.metrics import CONFIDENCE, Interval, Resampler, difference, matrix, means, retention
from evals.routes import FULL, Routes
from evals.runner import Answerer, Record
from reroute_jax.routing.cost import Account, account
from reroute_jax.routing.plan import Schedule

TERA = 1e12
RESIZED_NOTE = (
    "Above, pixels are divided by the stored image's size, as the reference does. Below (metrics named ..."
    f"{RESIZED}), by the size\nthat the model saw and answers in:"
)
COST_NOTE = (
    "TFLOPs: multiply-accumulates of the prefill, text included, as the papers count them (three-matrix MLP; the "
    "2-matrix form\nis FastV's); the scoring of the decisions is in neither. KV bytes: after the prefill."
)


def summarise(
    records: Mapping[str, Sequence[Record]], routes: Routes, names: Sequence[str], model: Answerer, seed: int
) -> dict[str, Any]:
    """Means, cost, retention against the full run, and the differences asked for, with their intervals. JSON-able.

    records: by run, over the same questions in the same order. names: of the metrics; one that applies to no question
    is left out.
    """
    names = [name for name in names if any(name in record["metrics"] for record in records[FULL])]
    scores = {run: matrix([record["metrics"] for record in lines], names) for run, lines in records.items()}
    resampler = Resampler(tuple(record["question_id"] for record in records[FULL]), seed)
    runs = {}
    for run in routes.runs:
        runs[run.name] = {
            "metrics": dict(zip(names, means(scores[run.name]).tolist(), strict=True)),
            "cost": mean_cost(run.schedule, model, records[run.name]),
        }
        if run.name != FULL:
            kept = retention(scores[run.name], scores[FULL], resampler)
            runs[run.name]["retention_percent"] = _named(names, kept)
    contrasts = {
        f"{first} minus {second}": _named(names, difference(scores[first], scores[second], resampler))
        for first, second in routes.contrasts
    }
    return {"questions": len(records[FULL]), "runs": runs, "differences": contrasts}


def mean_cost(schedule: Schedule, model: Answerer, records: Sequence[Record]) -> dict[str, Any]:
    """Cost of a question, averaged over `records`; compute in multiply-accumulates, as the papers count FLOPs."""
    sizes = Counter((tuple(record["visual_grid"]), record["text_tokens"]) for record in records)
    accounts = [
        account(schedule, model.config.decoder, visual=grid[0] * grid[1], text=text, grid=grid, dtype=model.dtype)
        for grid, text in sizes
    ]

    def mean(of: Callable[[Account], float]) -> float:
        return float(np.average([of(one) for one in accounts], weights=list(sizes.values())))

    return {
        "label": schedule.label,
        "visual_tokens": mean(lambda one: one.visual),
        "average_visual_tokens": mean(lambda one: one.average),
        "nominal_visual_tokens": mean(lambda one: one.nominal),
        "kv_visual_tokens": mean(lambda one: one.kv_visual),
        "kv_tokens": mean(lambda one: one.kv_tokens),
        "kv_bytes": mean(lambda one: one.kv_bytes),
        **{
            f"{part}_{form}": mean(lambda one, part=part, form=form: getattr(getattr(one, part), form))
            for part in ("prompt", "visual_only")
            for form in ("swiglu", "fastv", "gqa", "scoring")
        },
    }


def render(summary: Mapping[str, Any]) -> str:
    """The tables of a summary, as text: means, retention, differences, and cost. Metrics of boxes in the frame that the
    model saw get tables of their own."""
    names = list(summary["runs"][FULL]["metrics"])
    resized = [name for name in names if name.endswith(RESIZED)]
    tables = _metric_tables(summary, [name for name in names if name not in resized])
    if resized:
        tables += [RESIZED_NOTE, *_metric_tables(summary, resized)]
    tables.append(f"{_cost_table(summary['runs'])}\n{COST_NOTE}")
    return "\n\n".join(text for text in tables if text)


def _metric_tables(summary: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    runs = summary["runs"]
    columns = [name.removeprefix("refcoco_").removesuffix(RESIZED) for name in names]
    kept = {run: values["retention_percent"] for run, values in runs.items() if run != FULL}
    return [
        table(["mean", *columns], [[run, *(f"{v['metrics'][n]:.4f}" for n in names)] for run, v in runs.items()]),
        _interval_table([f"% of {FULL}", *columns], kept, names, "{:.1f}", 1),
        _interval_table(["difference x 100", *columns], summary["differences"], names, "{:+.1f}", 100),
    ]


def _cost_table(runs: Mapping[str, Any]) -> str:
    header = [
        "cost per question",
        "visual tokens/layer",
        "nominal",
        "TFLOPs",
        "2-matrix form",
        "scoring adds",
        "KV bytes",
    ]
    rows = []
    for run, values in runs.items():
        cost = values["cost"]
        tera = [f"{cost[f'prompt_{form}'] / TERA:.4g}" for form in ("swiglu", "fastv", "scoring")]
        tokens = [f"{cost[f'{kind}_visual_tokens']:.2f}" for kind in ("average", "nominal")]
        rows.append([run, *tokens, *tera, f"{cost['kv_bytes']:.0f}"])
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
