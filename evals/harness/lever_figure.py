"""What the levers of a schedule are worth, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PANEL_INCHES = (6.0, 0.55)  # width; height of a level
COLOURS = {"all": "black", "delete": "C3", "reroute": "C0"}


def draw(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Points of ACC@0.5 of every level with their intervals, under all actions and under each; a panel for each model
    and budget. rows: lines of `evals.levers`."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["model"], row["budget"]) for row in rows))
    levels = list(dict.fromkeys((row["lever"], row["level"]) for row in rows))
    width, height = PANEL_INCHES
    size = (width * len(panels), height * len(levels) + 1)
    figure = Figure(figsize=size, layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (model, budget) in zip(all_axes, panels, strict=True):
        own = [row for row in rows if (row["model"], row["budget"]) == (model, budget)]
        for number, (within, colour) in enumerate(COLOURS.items()):
            _points(axes, [row for row in own if row["within"] == within], levels, 0.2 * (number - 1), within, colour)
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set(title=f"{model}, {budget}", xlabel="points of ACC@0.5")
        axes.set_yticks(range(len(levels)), [f"{lever}: {level}" for lever, level in levels])
    all_axes[0].invert_yaxis()
    all_axes[-1].legend(fontsize="x-small", title="under", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(file, dpi=120)


def _points(
    axes: Any, rows: Sequence[Mapping[str, Any]], levels: Sequence, offset: float, label: str, colour: str
) -> None:
    worth = [row["worth"] for row in rows]
    values = [one["value"] for one in worth]
    ends = [[_length(one["value"], one[end]) for one in worth] for end in ("low", "high")]
    places = [levels.index((row["lever"], row["level"])) + offset for row in rows]
    axes.errorbar(
        values, places, xerr=ends, fmt="o", markersize=3, elinewidth=0.8, capsize=2, color=colour, label=label
    )


def _length(value: float, end: float | None) -> float:
    """Of a bar, none where the interval is not known."""
    return 0.0 if end is None else abs(end - value)
