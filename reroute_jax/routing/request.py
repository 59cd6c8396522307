"""What a method is asked to plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from reroute_jax.routing.nuwa_rules import NuwaRules
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.solver import Ratio
from reroute_jax.routing.switches import Switches


@dataclass(frozen=True)
class PlanRequest:
    """One call of `plan`, checked. budget: share of the visual tokens; tier: its name where it has one. nuwa: the
    family's rules, None where Nuwa has none. label: of the schedule."""

    method: str
    family: str
    nuwa: NuwaRules | None
    num_layers: int
    visual: int
    grid: tuple[int, int]
    budget: Fraction
    tier: int | None
    action: str
    switches: Switches
    label: str

    @property
    def average(self) -> Fraction:
        """Visual tokens per decoder layer."""
        return self.budget * self.visual

    def schedule(self, layers: Sequence[int], keep: Sequence[Ratio | int], **more) -> Schedule:
        """The schedule of these decisions under the request's action, position mode, repair and label."""
        return Schedule.from_decisions(
            layers,
            keep,
            self.num_layers,
            self.action,
            position_mode=self.switches.position_mode,
            first_image_only=self.switches.first_image_only,
            deepstack=self.switches.deepstack,
            repair=None if self.switches.repair == "none" else self.switches.repair,
            label=self.label,
            **more,
        )
