"""`python -m benchmarks.audit`: what configurations of the literature spend, beside what their rows are called.

Nothing is run: keep counts, layers and depth say what a configuration spends, and how little its decision layers
could: the layers before the first decision run all tokens. The table of docs/baselines.md is made by this command.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from evals.speed.checkpoint_shapes import SHAPES
from reroute_jax.commandline.parsing import Parser, exit_code
from reroute_jax.config import ModelConfig
from reroute_jax.models import FAMILIES, read_config
from reroute_jax.routing.cost import account
from reroute_jax.routing.methods import plan
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.presets import preset

GRID, TEXT = (24, 24), 64
VISUAL = GRID[0] * GRID[1]


@dataclass(frozen=True)
class AuditRow:
    """A configuration. called: tokens that tables call it by, None where it has no such name."""

    name: str
    called: int | None
    schedule: Schedule


def rows(num_layers: int = 32) -> list[AuditRow]:
    """On LLaVA-1.5-7B: 576 visual tokens, 32 layers."""

    def by_hand(layers: Sequence[int], keep: Sequence[Fraction | int], **more) -> Schedule:
        return Schedule.from_decisions(layers, keep, num_layers, "delete", **more)

    def made(method: str, budget: int | None = None, **more) -> Schedule:
        return plan(method, num_layers=num_layers, visual=VISUAL, grid=GRID, budget=budget, **more)

    half, quarter = Fraction(1, 2), Fraction(1, 4)
    found = [
        AuditRow("FastV, K=2, R=50% (its paper)", None, by_hand((2,), (half,), score="previous_layer")),
        AuditRow(
            "FastV, K=2, R=75% (its code; SparseVLMs issue 12)", 192, by_hand((2,), (quarter,), score="previous_layer")
        ),
        AuditRow(
            "PyramidDrop, layers 8, 16, 24, half each (its paper)", None, by_hand((8, 16, 24), (half, quarter, half**3))
        ),
        # 172 winners and a grid of 64 are about 217 different tokens (17).
        AuditRow(
            "FEATHER, layers 8 and 16 (its paper)", None, by_hand((8, 16), (217, 19), score="previous_layer_unrotated")
        ),
        AuditRow("V2Drop, layers 3, 17, 22 (its release)", 192, preset("v2drop_llava15", num_layers)),
        AuditRow(
            "IVC-Prune, half at layer 16 (its paper)", 288, made("ivc", keep=(half,), layers=(16,), action="delete")
        ),
    ]
    least = (1, 1, 1)
    found += [
        AuditRow("PyramidDrop's layers 8, 16, 24 with one token left", tier, by_hand((8, 16, 24), least))
        for tier in (128, 64)
    ]
    found.append(AuditRow("FEATHER's layers 8 and 16 with one token left", 128, by_hand((8, 16), least[:2])))
    for tier in (192, 128, 64):
        found.append(AuditRow(f"Nuwa {tier} (its paper)", tier, made("nuwa", tier, action="delete")))
    for variant in ("fastv_K3", "pdrop_earlyL2", "ours_vs_fastv", "ours_vs_pdrop"):
        for tier in (192, 128, 64):
            name = f"llava15_{variant}_avg{tier}"
            found.append(AuditRow(f"{name} (Reroute's release)", tier, preset(name, num_layers)))
    return found


def table(found: Sequence[AuditRow], config: ModelConfig) -> str:
    """Markdown."""
    lines = [
        "| configuration | called | tokens a layer | of 576 | at least | TMACs with scoring | merging, GMACs "
        "| KV tokens a layer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    everything = AuditRow("all tokens", None, Schedule.from_decisions((), (), config.num_layers))
    lines.append(_line(everything, VISUAL, config))
    for row in found:
        entering = row.schedule.merged_count(VISUAL, GRID)
        least = entering * row.schedule.decisions[0].lo / config.num_layers
        lines.append(_line(row, least, config))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table. Returns 0."""
    args = Parser("benchmarks.audit", __doc__, ()).parse_args(argv)
    config = read_config(SHAPES["llava-1.5-7b"].config("bfloat16"))
    return exit_code(lambda: print(table(rows(), config)), args.debug)


def _verdict(called: int, average: float, least: float) -> str:
    if least > called:
        return " (**cannot be**)"
    return " (**not that**)" if abs(average - called) > 0.05 * called else ""


def _line(row: AuditRow, least: float, config: ModelConfig) -> str:
    tower = FAMILIES[config.family].tower_sizes(config)
    cost = account(row.schedule, config.decoder, visual=VISUAL, text=TEXT, grid=GRID, tower=tower)
    cells = [
        row.name,
        "" if row.called is None else f"{row.called}{_verdict(row.called, cost.average, least)}",
        f"{cost.average:.1f}",
        f"{100 * cost.average / VISUAL:.1f} %",
        f"{least:.0f}",
        f"{cost.prompt.total() / 1e12:.2f}",
        f"{cost.merging / 1e9:.2f}" if cost.merging else "",
        f"{cost.kv_visual / config.num_layers:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
