"""`python -m benchmarks.load_figure runs/load.jsonl --out runs/load.png`

Draws what `benchmarks.load` and `benchmarks.torch_loop` recorded: goodput and the p99 of whole answers by rate, a line
for each plan; a dotted one is its requests a second at saturation.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reroute_jax.commandline.parsing import OUTPUT, RUN, Parser, exit_code
from reroute_jax.errors import RerouteError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 after one line on bad input."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: draw(read(args.records), args.out), args.debug)


def read(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Raises RerouteError for a file that holds no records."""
    records = []
    for file in files:
        try:
            found = [json.loads(line) for line in file.read_text().splitlines()]
        except (OSError, ValueError) as problem:
            raise RerouteError(f"{file} holds no records ({problem}): give what benchmarks.load wrote") from problem
        records += found
    if not any("rate_per_s" in one for one in records):
        raise RerouteError("no record is of a rate: give what benchmarks.load wrote")
    return records


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    # Imported here: matplotlib is an extra, and a machine without it is told so.
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(9, 3.6))
    goodput, p99 = canvas.subplots(1, 2)
    for number, plan in enumerate(dict.fromkeys(one["plan"] for one in records)):
        own, colour = [one for one in records if one["plan"] == plan], f"C{number}"
        at = sorted((one for one in own if "rate_per_s" in one), key=lambda one: one["rate_per_s"])
        rates = [one["rate_per_s"] for one in at]
        goodput.plot(rates, [one["goodput_per_s"] for one in at], "o-", color=colour, label=plan)
        p99.plot(rates, [one["whole_p99_s"] for one in at], "o-", color=colour, label=plan)
        for one in own:
            if "saturated_per_s" in one:
                goodput.axhline(one["saturated_per_s"], color=colour, linestyle=":", linewidth=1)
    limit = next(one["limit_s"] for one in records if "limit_s" in one)
    p99.axhline(limit, color="black", linewidth=0.5)
    p99.set_yscale("log")
    goodput.set_ylabel(f"answers within {limit:g} s, a second")
    p99.set_ylabel("p99 of whole answers, s")
    for panel in (goodput, p99):
        panel.set_xlabel("requests a second")
        panel.legend(fontsize=7)
    canvas.tight_layout()
    canvas.savefig(path, dpi=110)


def _parser() -> Parser:
    parser = Parser("benchmarks.load_figure", __doc__, ("runs/load.jsonl runs/torch_loop.jsonl --out runs/load.png",))
    parser.group(RUN).add_argument("records", nargs="+", type=Path, metavar="FILE", help="JSON lines")
    parser.group(OUTPUT).add_argument(
        "--out", type=Path, default=Path("runs/load.png"), help="PNG or SVG (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
