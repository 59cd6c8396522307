"""From measured seconds to the table of `evals.bench`: medians, ratios, and theory beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reroute_jax.errors import RerouteError

FULL = "none"


@dataclass(frozen=True)
class TimingRecord:
    """One variant at one batch size. seconds: of tower, prefill and decode, a triple a repetition.

    macs, scoring_macs: theory of one row's decoder layers; merging_macs: of what comes before them, beside the tower.
    bound_seconds, decode_bound_seconds: roofline of a prefill and of one decode step. kv_bytes: theory, of the batch;
    cache_bytes: as allocated. rows_unchanged: rows that answer as at batch 1. What is not known of a peer is None.
    """

    variant: str
    method: str
    action: str | None
    budget: str | None
    batch: int
    peer: bool
    seconds: Sequence[tuple[float, float, float]]
    new_tokens: int
    average: float
    macs: int
    scoring_macs: int
    merging_macs: int
    bound_seconds: float
    decode_bound_seconds: float
    kv_bytes: int
    cache_bytes: int | None = None
    compile_seconds: float | None = None
    memory_bytes: int | None = None
    rows_unchanged: str | None = None


def rows_of(records: Sequence[TimingRecord], peak_tflops: float | None = None) -> list[dict[str, Any]]:
    """One row a record. Ratios are to the unrouted run of the same batch size, and of the same side (ours or a peer's
    is compared with ours).

    peak_tflops: of the device, for the model's dtype; where given, each row has its `mfu`, the model FLOPs utilisation
    of the prefill: two FLOPs a multiply-accumulate of the batch, over the median seconds and the peak. What counts are
    `macs`: the decoder layers on the tokens that the schedule keeps. Image tower, embedding, scoring pass and head do
    not, although the seconds hold all of them but the tower; causal attention counts as the whole square, as in the
    papers' formula.
    """
    full = {one.batch: one for one in records if one.variant == FULL}
    rows = [_row(one, full[one.batch]) for one in records]
    prefill = {(row["variant"], row["batch"]): row["prefill_ms"] for row in rows}
    for row, one in zip(rows, records, strict=True):
        if peak_tflops is not None:
            row["mfu"] = 2 * one.macs * one.batch / (1e-3 * row["prefill_ms"] * 1e12 * peak_tflops)
        deleted = prefill.get((row["variant"].replace("reroute", "delete"), row["batch"]))
        if one.action == "reroute" and deleted and not one.peer:
            row["reroute_over_delete"] = row["prefill_ms"] / deleted
        reference = prefill.get((f"torch reference: {one.variant}", one.batch))
        peer = prefill.get(("torch", one.batch)) if one.variant == FULL else reference
        if peer and not one.peer:
            row["torch_over_ours"] = peer / row["prefill_ms"]
    return rows


def _row(one: TimingRecord, full: TimingRecord) -> dict[str, Any]:
    tower, prefill, decode = np.array(one.seconds).T
    full_prefill = np.array(full.seconds)[:, 1]
    whole = tower + prefill + decode
    steps = max(1, one.new_tokens - 1)
    row = {
        "variant": one.variant,
        "batch": one.batch,
        "visual_per_layer": one.average,
        "tower_ms": 1e3 * median(tower),
        "prefill_ms": 1e3 * median(prefill),
        "prefill_p99_ms": 1e3 * float(np.percentile(prefill, 99)),
        "prefill_best_ms": 1e3 * float(prefill.min()),
        "decode_ms_per_token": 1e3 * median(decode) / steps,
        "decode_best_ms_per_token": 1e3 * float(decode.min()) / steps,
        "tokens_per_s": one.batch * one.new_tokens / median(whole),
        "images_per_s": one.batch / median(whole),
    }
    if one.peer:
        return row
    theory = full.macs / (one.macs + one.scoring_macs)
    bound = full.bound_seconds / one.bound_seconds
    faster = median(full_prefill) / median(prefill)
    best = float(full_prefill.min() / prefill.min())
    return row | {
        "speedup": faster,
        "theory_without_scoring": full.macs / one.macs,
        "theory": theory,
        "merging_gmacs": one.merging_macs / 1e9 if one.merging_macs else None,
        "roofline": bound,
        "realised_over_theory": faster / theory,
        "realised_over_roofline": faster / bound,
        "best_over_theory": best / theory,
        "bound_ms": 1e3 * one.bound_seconds,
        "decode_bound_ms": 1e3 * one.decode_bound_seconds,
        "decode_bytes_ratio": one.decode_bound_seconds / full.decode_bound_seconds,
        "kv_mb": one.kv_bytes / 1e6,
        "kv_ratio": one.kv_bytes / full.kv_bytes,
        "cache_mb": one.cache_bytes / 1e6,
        "compile_s": one.compile_seconds,
        "memory_mb": one.memory_bytes / 1e6,
        "rows_unchanged": one.rows_unchanged,
    }


def median(values) -> float:
    return float(np.median(values))


# Column heading, key, format.
COLUMNS = (
    ("run", "variant", "{}"),
    ("batch", "batch", "{}"),
    ("visual / layer", "visual_per_layer", "{:.1f}"),
    ("prefill p50 ms", "prefill_ms", "{:.0f}"),
    ("p99", "prefill_p99_ms", "{:.0f}"),
    ("best", "prefill_best_ms", "{:.0f}"),
    ("MFU", "mfu", "{:.2f}"),
    ("speed-up", "speedup", "{:.2f}"),
    ("theory", "theory_without_scoring", "{:.2f}"),
    ("+ scoring", "theory", "{:.2f}"),
    ("merging GMACs", "merging_gmacs", "{:.3g}"),
    ("roofline", "roofline", "{:.2f}"),
    ("realised / theory", "realised_over_theory", "{:.2f}"),
    ("of best runs", "best_over_theory", "{:.2f}"),
    ("reroute / delete", "reroute_over_delete", "{:.2f}"),
    ("torch / ours", "torch_over_ours", "{:.2f}"),
    ("decode ms/token", "decode_ms_per_token", "{:.1f}"),
    ("tokens/s", "tokens_per_s", "{:.1f}"),
    ("images/s", "images_per_s", "{:.2f}"),
    ("KV MB", "kv_mb", "{:.1f}"),
    ("KV ratio", "kv_ratio", "{:.2f}"),
    ("compile s", "compile_s", "{:.1f}"),
    ("memory MB", "memory_mb", "{:.0f}"),
    ("rows unchanged", "rows_unchanged", "{}"),
)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown; columns that no row has are left out."""
    used = [column for column in COLUMNS if any(row.get(column[1]) is not None for row in rows)]
    lines = ["| " + " | ".join(heading for heading, _, _ in used) + " |", "|" + "---|" * len(used)]
    for row in rows:
        cells = ("" if row.get(key) is None else form.format(row[key]) for _, key, form in used)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of the realised prefill speed-up, one panel a batch size; ticks mark theory with scoring, dots the roofline.

    Raises RerouteError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RerouteError("a figure needs matplotlib, which is not installed: pip install -e '.[plot]'") from error
    routed = [row for row in rows if "speedup" in row and row["variant"] != FULL]
    batches = sorted({row["batch"] for row in routed})
    canvas = Figure(figsize=(0.42 * max(8, len(routed) // max(1, len(batches))) + 2, 3.2 * len(batches) + 1.2))
    panels = canvas.subplots(len(batches), 1, squeeze=False, sharex=True)[:, 0]
    for panel, batch in zip(panels, batches, strict=True):
        shown = [row for row in routed if row["batch"] == batch]
        place = np.arange(len(shown))
        colours = ["tab:blue" if "reroute" in row["variant"] else "tab:grey" for row in shown]
        panel.bar(place, [row["speedup"] for row in shown], color=colours, width=0.7)
        panel.plot(place, [row["theory"] for row in shown], "k_", markersize=14, label="FLOPs with scoring")
        panel.plot(place, [row["roofline"] for row in shown], "r.", label="roofline")
        panel.axhline(1, color="black", linewidth=0.5)
        panel.set_ylabel(f"prefill speed-up, batch {batch}")
        panel.set_xticks(place, [row["variant"] for row in shown], rotation=60, ha="right", fontsize=7)
        panel.legend(fontsize=7)
    canvas.tight_layout()
    canvas.savefig(path, dpi=110)
