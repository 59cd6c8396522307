"""One stage of a schedule: layers, and the decision that opens them. Host code."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from reroute_jax.errors import RerouteError, one_of
from reroute_jax.routing.floors import Floor
from reroute_jax.routing.repair import REPAIRS
from reroute_jax.routing.scores import SCORES, default_seeds

ACTIONS = ("delete", "reroute", "layout")


@dataclass(frozen=True)
class Stage:
    """Decoder layers [lo, hi) that run on one selection of visual tokens.

    ratio: keep ratio of the row's visual count at the decoder input; a Fraction multiplies exactly, a float in float64.
    count: or an absolute count. Neither: no decision, every visual token runs.
    of_kept: the ratio is of what the decision before kept, and not of the decoder input.
    action: what becomes of the visual tokens that a decision leaves out: gone ("delete"), candidates of the next
    decision ("reroute"), or in the layout without ever returning ("layout", which isolates what recovery is worth).
    score: how a decision ranks, a name in `scores.SCORES`. Both are None without a decision.
    floor: tokens that are kept whatever their scores (14), inside the count, or with `union` on top of it (14.3).
    repair: of tokens that were rerouted, before the next decision sees them, a name in `repair.REPAIRS` (15.2).
    """

    lo: int
    hi: int
    ratio: float | Fraction | None = None
    count: int | None = None
    action: str | None = None
    score: str | None = None
    of_kept: bool = False
    floor: Floor | None = None
    union: bool = False
    repair: str | None = None

    def __post_init__(self) -> None:
        where = f"stage [{self.lo}, {self.hi})"
        if not 0 <= self.lo < self.hi:
            raise RerouteError(f"{where} is empty or starts below layer 0, expected 0 <= lo < hi")
        if self.ratio is not None and self.count is not None:
            raise RerouteError(f"{where} has both a ratio and a count, give one of them")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise RerouteError(f"{where} keeps a ratio of {float(self.ratio):g}, expected a value in (0, 1]")
        if self.count is not None and self.count < 1:
            raise RerouteError(f"{where} keeps {self.count} visual tokens, expected at least 1")
        if not self.decides:
            for what in ("action", "score", "floor", "repair"):
                if getattr(self, what) is not None:
                    raise RerouteError(f"{where} has a {what} but no ratio or count, give one or drop the {what}")
            return
        one_of(f"the action of {where}", self.action, ACTIONS)
        one_of(f"the score of {where}", self.score, tuple(SCORES))
        if self.repair is not None:
            one_of(f"the repair of {where}", self.repair, tuple(filter(None, REPAIRS)))
            if self.action != "reroute":
                raise RerouteError(
                    f"{where} has repair={self.repair!r} for tokens that return and action={self.action!r}: use "
                    "action='reroute', or no repair"
                )
        if SCORES[self.score].previous and self.lo == 0:
            raise RerouteError("a decision at layer 0 has no previous layer, use score='last_token' or a later layer")
        if self.of_kept and self.ratio is None:
            raise RerouteError(f"{where} keeps a count, of_kept belongs to a ratio: leave it out")
        if self.union and self.floor is None:
            raise RerouteError(f"{where} has no floor to unite its count with, give one or leave out union")
        if self.floor is not None and not self.floor.fixed and not SCORES[self.score].has_seeds:
            raise RerouteError(
                f"{where} keeps the seeds of a score in two passes, and score={self.score!r} has one: use "
                "'value_similarity' or a floor without seeds"
            )

    @property
    def narrows(self) -> bool:
        """Whether later decisions choose among what this one selected."""
        return self.action in ("delete", "layout")

    @property
    def decides(self) -> bool:
        return self.ratio is not None or self.count is not None

    def keep(self, visual: int, kept: int | None = None) -> int:
        """Keep count for a row of `visual` tokens before the limit to the current candidates (2.2); 0 without any.
        kept: what the decision before kept, None for the first."""
        if visual == 0:
            return 0
        base = visual if kept is None or not self.of_kept else kept
        return self.count if self.count is not None else max(1, int(base * self.ratio))

    def seeds(self, visual: int, keep: int) -> int:
        """How many tokens the second pass of a score looks from (13.3)."""
        if not SCORES[self.score].has_seeds:
            return 0
        own = 0 if self.floor is None else self.floor.seeds(visual, keep)
        return own or default_seeds(visual)
