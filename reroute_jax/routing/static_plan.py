"""What of a schedule is static for the programs: caps, names and switches, but no labels, seeds or ratios."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class StagePlan:
    """Layers [lo, hi) with a static limit on selected visual tokens; cap None: no decision, all of them run.

    The last decision's action is "delete" whatever was asked: nothing comes after it. seed_cap: limit on the seeds of a
    score in two passes. floor: whether the host made one, keeps_seeds: whether the seeds are one; union: on top of the
    count. share: of what the decision before kept, where only the device knows that. repair: of tokens that return;
    proxies: limit on the rows that run for them.
    """

    lo: int
    hi: int
    cap: int | None
    action: str | None
    score: str | None
    seed_cap: int = 0
    floor: bool = False
    keeps_seeds: bool = False
    union: bool = False
    share: Fraction | None = None
    repair: str | None = None
    proxies: int = 0


@dataclass(frozen=True)
class RoutingPlan:
    """Static argument of the compiled functions: only what changes the program, so no labels, seeds or ratios.

    deepstack: "all" or "running", of a `Schedule`.
    """

    stages: tuple[StagePlan, ...]
    position_mode: str
    bidirectional_layer: int | None = None
    cut_caches: str = "no"
    renumbers_input: bool = False
    deepstack: str = "all"

    @property
    def undecided(self) -> int:
        """Layers before the first decision."""
        first = self.stages[0]
        return first.hi if first.cap is None else 0
