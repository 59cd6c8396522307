"""Plain-text tables of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evals.metrics import CONFIDENCE, Interval


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart: the first to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def metric_rows(
    means: Mapping[str, Mapping[str, float]],
    comparisons: Mapping[str, Mapping[str, Interval]],
    metrics: Sequence[str],
    percent: str = "",
) -> str:
    """One line per run with its means, then two per comparison: the estimate and its interval."""
    header = ["", *(name.removeprefix("refcoco_") for name in metrics)]
    rows = [[name, *(f"{values[metric]:.4f}" for metric in metrics)] for name, values in means.items()]
    for name, values in comparisons.items():
        rows.append([name, *(_estimate(values[metric]) for metric in metrics)])
        rows.append([f"  {CONFIDENCE:.0%} interval", *(_bounds(values[metric]) for metric in metrics)])
    return table(header, rows)
