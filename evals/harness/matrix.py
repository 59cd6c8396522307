"""What a matrix of runs comes to: retention and gains, as Markdown, CSV and a figure.

Retention is a score as a percentage of the score with all visual tokens; an average is the plain mean of retentions
over tasks; the gain of a reroute is its retention less that of the deletion on the same budget.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from evals.harness.metrics import CONFIDENCE, Interval, interval
from evals.harness.report import Scored
from evals.harness.routes import FULL

AVERAGE = "average"
UNKNOWN = Interval(None, None, None)
PANEL_INCHES = (5.0, 3.8)


@dataclass(frozen=True)
class Entry:
    """A row of the table. run: whose answers fill it; rows of one computation share it.

    method and action name the line of the figure that it is a point of. against: the run that its gain is over.
    """

    name: str
    run: str
    method: str = ""
    action: str = ""
    budget: str = ""
    against: str | None = None


@dataclass(frozen=True)
class Outcome:
    """The runs of a model on a task. kind: of the average that it counts for. metric: its headline.

    scale: what scores are shown times.
    """

    task: str
    kind: str
    metric: str
    scale: int
    summary: Mapping[str, Any]
    scored: Scored

    def score(self, run: str) -> float:
        return self.summary["runs"][run]["metrics"][self.metric]

    def cost(self, run: str, what: str) -> float:
        return self.summary["runs"][run]["cost"][what]

    def draws(self, stream: int) -> dict[str, Float[np.ndarray, " resamples"]]:
        """The headline of every run in each resample of the questions; stream 0 has those of the summary."""
        runs, resampler = list(self.scored.columns), self.scored.resampler
        resampler = replace(resampler, seed=resampler.seed + stream)
        means = np.split(resampler.means(np.column_stack([self.scored.columns[run] for run in runs])), len(runs), 1)
        place = self.scored.names.index(self.metric)
        draws = (resampler.told(self.scored.estimate(found)) for found in means)
        return {run: found[:, place] for run, found in zip(runs, draws, strict=True)}


@dataclass(frozen=True)
class Average:
    """Mean retention over tasks, which are resampled independently of each other."""

    outcomes: tuple[Outcome, ...]

    def share(self, run: str) -> float:
        """Visual tokens per decoder layer, as a percentage of all of them."""
        parts = [one.cost(run, "average_visual_tokens") / one.cost(run, "visual_tokens") for one in self.outcomes]
        return float(100 * np.mean(parts))

    def tokens(self, run: str) -> float:
        return float(np.mean([one.cost(run, "average_visual_tokens") for one in self.outcomes]))

    def macs(self, run: str) -> float:
        """Multiply-accumulates of a prefill, with scoring and what a reduction before the decoder computes."""
        parts = ("prompt_swiglu", "prompt_scoring", "merging")
        return float(np.mean([sum(one.cost(run, part) for part in parts) for one in self.outcomes]))

    def kv_bytes(self, run: str) -> float:
        return float(np.mean([one.cost(run, "kv_bytes") for one in self.outcomes]))

    def retention(self, run: str) -> Interval:
        return UNKNOWN if run == FULL else interval(self._value(run), self._draws[run])

    def gain(self, entry: Entry) -> Interval:
        """In points of retention."""
        if entry.against is None:
            return UNKNOWN
        with np.errstate(invalid="ignore"):
            value = np.subtract(self._value(entry.run), self._value(entry.against))
            return interval(value, self._draws[entry.run] - self._draws[entry.against])

    def _value(self, run: str) -> float:
        return float(np.mean([_percent(one.score(run), one.score(FULL)) for one in self.outcomes]))

    @cached_property
    def _draws(self) -> dict[str, np.ndarray]:
        drawn = [one.draws(stream) for stream, one in enumerate(self.outcomes)]
        return {run: np.mean([_percent(one[run], one[FULL]) for one in drawn], axis=0) for run in drawn[0]}


@dataclass(frozen=True)
class Sheet:
    """All of one model. entries: the one with all tokens first. notes: sentences below its table."""

    model: str
    entries: tuple[Entry, ...]
    outcomes: tuple[Outcome, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def alone(self) -> tuple[Average, ...]:
        """Each task's own, which is what its summary says."""
        return tuple(Average((one,)) for one in self.outcomes)

    @cached_property
    def averages(self) -> dict[str, Average]:
        """By kind."""
        kinds = dict.fromkeys(one.kind for one in self.outcomes)
        return {kind: Average(tuple(one for one in self.outcomes if one.kind == kind)) for kind in kinds}


def markdown(sheets: Sequence[Sheet]) -> str:
    """One table a model: for each task the score and, in brackets, its retention; for each average its interval."""
    return "\n\n".join(_markdown(sheet) for sheet in sheets) + "\n"


def _markdown(sheet: Sheet) -> str:
    everything = Average(sheet.outcomes)
    header = ["configuration", "visual tokens per layer", "% of all", "TMACs with scoring", "KV MB"]
    header += [f"{one.task} {one.metric.removeprefix('refcoco_')}" for one in sheet.outcomes]
    for kind, average in sheet.averages.items():
        count = len(average.outcomes)
        header += [f"{kind}, mean of {count}: % of full ({CONFIDENCE:.0%})" if count > 1 else f"{kind}: % of full"]
        header += [f"gain ({CONFIDENCE:.0%})"]
    rows = []
    for entry in sheet.entries:
        row = [entry.name, f"{everything.tokens(entry.run):.2f}", f"{everything.share(entry.run):.1f}"]
        row += [f"{everything.macs(entry.run) / 1e12:.4g}", f"{everything.kv_bytes(entry.run) / 1e6:.4g}"]
        row += [_score(one, entry) for one in sheet.outcomes]
        for average in sheet.averages.values():
            row.append("" if entry.run == FULL else _shown(average.retention(entry.run), "{:.1f}"))
            row.append("" if entry.against is None else _shown(average.gain(entry), "{:+.1f}"))
        rows.append(row)
    lines = [header, ["---"] * len(header), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([f"## {sheet.model}", table, *sheet.notes])


def _score(outcome: Outcome, entry: Entry) -> str:
    score = f"{outcome.scale * outcome.score(entry.run):.1f}"
    if entry.run == FULL:
        return score
    kept = outcome.summary["runs"][entry.run]["retention_percent"][outcome.metric]["value"]
    return f"{score} ({'n/a' if kept is None else f'{kept:.1f}'})"


def _shown(found: Interval, form: str) -> str:
    if found.value is None:
        return "n/a"
    bounds = "" if found.low is None else f" ({form.format(found.low)} to {form.format(found.high)})"
    return form.format(found.value) + bounds


def write_csv(sheets: Sequence[Sheet], file: Path) -> None:
    """One line for each configuration and task, and for each average; numbers as in the summaries, unrounded."""
    lines = [line for sheet in sheets for line in _lines(sheet)]
    with open(file, "w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def _lines(sheet: Sheet) -> Iterator[dict[str, Any]]:
    for entry in sheet.entries:
        identity = {
            "model": sheet.model,
            "configuration": entry.name,
            "answers": entry.run,
            "method": entry.method,
            "action": entry.action,
            "budget": entry.budget,
        }
        for one, alone in zip(sheet.outcomes, sheet.alone, strict=True):
            score = {
                "kind": one.kind,
                "task": one.task,
                "metric": one.metric,
                "questions": one.summary["questions"],
                "score": one.score(entry.run),
                **one.summary["runs"][entry.run]["answers"],
            }
            yield identity | score | _numbers(alone, entry)
        for kind, average in sheet.averages.items():
            nothing = dict.fromkeys(("metric", "questions", "score", "unparsed", "cut_off"), "")
            yield identity | {"kind": kind, "task": AVERAGE} | nothing | _numbers(average, entry)


def _numbers(average: Average, entry: Entry) -> dict[str, float | None]:
    kept, gain = average.retention(entry.run), average.gain(entry)
    return {
        "average_visual_tokens": average.tokens(entry.run),
        "share_percent": average.share(entry.run),
        "macs": average.macs(entry.run),
        "kv_bytes": average.kv_bytes(entry.run),
        "retention_percent": kept.value,
        "retention_low": kept.low,
        "retention_high": kept.high,
        "gain": gain.value,
        "gain_low": gain.low,
        "gain_high": gain.high,
    }


def draw(sheets: Sequence[Sheet], files: Sequence[Path]) -> None:
    """Retention against the realised budget, a panel for each model and kind, a line for each method and action."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(kind for sheet in sheets for kind in sheet.averages))
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * len(kinds), height * len(sheets)), layout="constrained")
    panels = figure.subplots(len(sheets), len(kinds), squeeze=False)
    methods = list(dict.fromkeys(entry.method for sheet in sheets for entry in sheet.entries if entry.method))
    for row, sheet in zip(panels, sheets, strict=True):
        for axes, kind in zip(row, kinds, strict=True):
            if kind in sheet.averages:
                _panel(axes, sheet, kind, methods)
            else:
                axes.set_axis_off()
    for file in files:
        figure.savefig(file, dpi=150)


def _panel(axes: Any, sheet: Sheet, kind: str, methods: Sequence[str]) -> None:
    average = sheet.averages[kind]
    lines: dict[tuple[str, str], dict[str, tuple[float, Interval]]] = {}
    for entry in sheet.entries:
        if entry.method:
            point = average.share(entry.run), average.retention(entry.run)
            lines.setdefault((entry.method, entry.action), {})[entry.run] = point
    for (method, action), points in lines.items():
        found = sorted((share, kept) for share, kept in points.values() if kept.value is not None)
        shares = [share for share, _ in found]
        values = [kept.value for _, kept in found]
        below = [np.nan if kept.low is None else kept.value - kept.low for _, kept in found]
        above = [np.nan if kept.high is None else kept.high - kept.value for _, kept in found]
        axes.errorbar(
            shares,
            values,
            yerr=[below, above],
            label=f"{method} {action}".strip(),
            color=f"C{methods.index(method)}",
            linestyle="--" if action == "delete" else "-",
            marker="o",
            markersize=3,
            elinewidth=0.8,
            capsize=2,
        )
    axes.axhline(100, color="grey", linewidth=0.8)
    axes.set(title=f"{sheet.model}, {kind}", xlabel="visual tokens per layer, % of all", ylabel="% of full")
    axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1), handlelength=4)


def _percent(part: Any, whole: Any) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return 100 * np.divide(part, whole)
