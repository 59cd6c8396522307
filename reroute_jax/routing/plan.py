"""Schedules, and the static plan made from one. Host code; arrays only from `keep_counts` and `seed_counts`.

Section numbers in this package are those of the method specification.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from reroute_jax.config import DecoderConfig
from reroute_jax.errors import RerouteError, one_of
from reroute_jax.routing import records
from reroute_jax.routing.floors import FLOORS, Floor
from reroute_jax.routing.kept import Kept
from reroute_jax.routing.merge import MERGES, Merge
from reroute_jax.routing.repair import REPAIRS
from reroute_jax.routing.scores import SCORES
from reroute_jax.routing.stages import ACTIONS, Stage
from reroute_jax.routing.static_plan import RoutingPlan, StagePlan
from reroute_jax.routing.visionzip import VisionZip
from reroute_jax.types import Grid

POSITION_MODES = ("original", "renumber")
CUTS = ("no", "all", "all_but_first")
PRIORS = ("random", "uniform")
DEEPSTACK = ("all", "running", "late")


@dataclass(frozen=True)
class Schedule:
    """When which share of the visual tokens runs. Hashable; one form for deletion, reroute and mixtures of them.

    position_mode: "original" keeps every token's position, "renumber" counts 0.. again after each decision (3.5).
    prior, seed: where scores of stages with score="prior" come from ("random" from the seed, or "uniform").
    first_image_only: of a row with several images, route the first and run the others like text, as the releases do.
    bidirectional_layer: a layer that runs without the causal mask in prefill (a defect of Nuwa's Qwen release, 5.4).
    cut_caches: "all" leaves of earlier layers' caches too only what the last decision kept; "all_but_first" spares
    layer 0, as IVC-Prune's LLaVA release does (15.1).
    deepstack: of a decoder that adds image features to the output of its first layers, which visual tokens get them:
    "all", deferred ones too, since to skip a layer is not to skip what is added behind it; "running", those that ran
    the layer; "late", all of them, because no decision may come before the last addition.
    """

    stages: tuple[Stage, ...]
    position_mode: str = "original"
    prior: str | None = None
    seed: int = 0
    merge: Merge | None = None
    first_image_only: bool = False
    bidirectional_layer: int | None = None
    cut_caches: str = "no"
    deepstack: str = "all"
    label: str = ""

    def __post_init__(self) -> None:
        edges = [0, *(stage.hi for stage in self.stages)]
        for stage, edge in zip(self.stages, edges, strict=False):
            if stage.lo != edge:
                raise RerouteError(
                    f"stage [{stage.lo}, {stage.hi}) was expected to start at layer {edge}: stages follow each other "
                    "from layer 0 without gaps"
                )
        if not self.stages:
            raise RerouteError("a schedule has no stages, expected stages that tile [0, L)")
        for stage in self.stages[1:]:
            if not stage.decides:
                raise RerouteError(
                    f"stage [{stage.lo}, {stage.hi}) has no keep ratio or count, only the first stage may lack them; "
                    "to run all tokens again use ratio=1.0"
                )
        one_of("position_mode", self.position_mode, POSITION_MODES)
        one_of("cut_caches", self.cut_caches, CUTS)
        one_of("deepstack", self.deepstack, DEEPSTACK)
        if not isinstance(self.seed, Integral) or self.seed < 0:
            raise RerouteError(f"the seed is {self.seed}, expected a whole number from 0 on")
        if self.bidirectional_layer is not None and not 0 <= self.bidirectional_layer < self.num_layers:
            raise RerouteError(
                f"bidirectional_layer is {self.bidirectional_layer}, expected a layer in 0..{self.num_layers - 1}"
            )
        self._check_scores()
        self._check_floors()
        self._check_repairs()
        if isinstance(self.merge, VisionZip) and self.merge.keeps_class:
            self._check_class_token()
        for what in ("ratio", "count"):
            of_input = [None if stage.of_kept else getattr(stage, what) for stage in self.decisions]
            _check_falling(what, self.decisions, of_input)

    def _check_scores(self) -> None:
        uses_prior = any(stage.score == "prior" for stage in self.decisions)
        if uses_prior:
            one_of("the prior of a schedule with score='prior'", self.prior, PRIORS)
        elif self.prior is not None:
            raise RerouteError(f"prior={self.prior!r} is given but no stage has score='prior'")
        for before, stage in pairwise(self.decisions):
            if before.action != "delete" and SCORES[stage.score].all_rows:
                raise RerouteError(
                    f"score={stage.score!r} at layer {stage.lo}: after a decision that {before.action}s, the layer "
                    "before has not seen every token, use 'last_token' there"
                )

    def _check_class_token(self) -> None:
        if self.position_mode != "renumber" or self.decisions:
            raise RerouteError(
                "a class token that is kept has no place in the image: use position_mode='renumber' and no decisions, "
                "or cls='drop'"
            )

    def _check_repairs(self) -> None:
        used = {stage.repair for stage in self.decisions}
        if self.position_mode == "renumber" and used - {None}:
            raise RerouteError("position_mode='renumber' is for runs without a repair, use 'original'")
        if self.deepstack == "running" and "mean_offset" in used:
            raise RerouteError(
                "deepstack='running' and repair='mean_offset', which hands on what only tokens that ran may get: use "
                "deepstack='all' or another repair"
            )

    def _check_floors(self) -> None:
        united = False
        for stage in self.decisions:
            if stage.floor is not None and self.merge is not None:
                raise RerouteError(
                    f"stage [{stage.lo}, {stage.hi}) has a floor, which is made for all tokens of an image, and the "
                    "schedule has a merge: leave out one of them"
                )
            if united and stage.of_kept and not isinstance(stage.ratio, Fraction):
                raise RerouteError(
                    f"stage [{stage.lo}, {stage.hi}) keeps {stage.ratio} of a number that each image decides: give an "
                    "exact Fraction"
                )
            united |= stage.union

    @cached_property
    def decisions(self) -> tuple[Stage, ...]:
        return tuple(stage for stage in self.stages if stage.decides)

    @property
    def renumbers_input(self) -> bool:
        """Whether positions are counted anew over what a reduction of section 16 leaves (18.5)."""
        return self.position_mode == "renumber" and isinstance(self.merge, Kept)

    @property
    def has_floor(self) -> bool:
        return any(stage.floor is not None for stage in self.decisions)

    @property
    def num_layers(self) -> int:
        return self.stages[-1].hi

    @classmethod
    def from_decisions(
        cls,
        layers: Sequence[Integral],
        keep: Sequence[Real],
        num_layers: int,
        action: str | Sequence[str] = "reroute",
        position_mode: str = "original",
        score: str | Sequence[str] = "last_token",
        floor: Floor | Sequence[Floor | None] | None = None,
        union: bool | Sequence[bool] = False,
        of_kept: bool | Sequence[bool] = False,
        repair: str | Sequence[str | None] | None = None,
        **more,
    ) -> Schedule:
        """Schedule that decides at the input of each of `layers` (0-based, ascending, below `num_layers`).

        keep: one entry a decision, a whole number is a count, any other a ratio in (0, 1]. action ("delete", "reroute"
        or "layout"), score, floor, union, of_kept, repair: one for all decisions, or one for each, as of `Stage`; one
        repair is for those that reroute. more: other fields of the schedule. Raises RerouteError on any inconsistency.
        """
        if not all(isinstance(layer, Integral) for layer in layers):
            raise RerouteError(f"decision layers are {list(layers)}, expected whole numbers")
        layers = [int(layer) for layer in layers]
        given = {"action": action, "score": score, "floor": floor, "union": union, "of_kept": of_kept}
        parts = {name: _for_each(value, len(layers)) for name, value in given.items()}
        for name in parts["action"] or [action]:
            one_of("action", name, ACTIONS)
        if not isinstance(repair, list | tuple):
            parts["repair"] = [repair if name == "reroute" else None for name in parts["action"]]
            if repair is not None and layers and "reroute" not in parts["action"]:
                raise RerouteError(
                    f"repair={repair!r} is for tokens that return and no decision reroutes: leave it out"
                )
        else:
            parts["repair"] = list(repair)
        sizes = {"keep": len(keep), **{name: len(values) for name, values in parts.items()}}
        if odd := [f"{size} of {name}" for name, size in sizes.items() if size != len(layers)]:
            raise RerouteError(f"{len(layers)} decision layers with {', '.join(odd)}, expected one for every layer")
        if layers != sorted(set(layers)) or (layers and not 0 <= layers[0] <= layers[-1] < num_layers):
            raise RerouteError(f"decision layers are {layers}, expected ascending layers in 0..{num_layers - 1}")
        edges = [*layers, num_layers]
        stages = [] if edges[0] == 0 else [Stage(0, edges[0])]
        for number, ((lo, hi), value) in enumerate(zip(pairwise(edges), keep, strict=True)):
            stages.append(Stage(lo, hi, **_amount(value), **{name: values[number] for name, values in parts.items()}))
        return cls(tuple(stages), position_mode=position_mode, **more)

    def check_depth(self, num_layers: int) -> None:
        """Raises RerouteError unless the schedule is for a decoder of `num_layers` layers."""
        if self.num_layers != num_layers:
            raise RerouteError(
                f"the schedule covers {self.num_layers} layers and the model has {num_layers}, make it for this model"
            )

    def check_deepstack(self, layers: int) -> None:
        """Raises RerouteError where deepstack="late" and a decision comes before the outputs of the first `layers`
        layers have got their image features."""
        early = [stage.lo for stage in self.decisions if stage.lo < layers]
        if self.deepstack == "late" and early:
            raise RerouteError(
                f"deepstack='late' and a decision at layer {early[0]}: this model adds image features behind its first "
                f"{layers} layers, decide from layer {layers} on (first_decision={layers})"
            )

    def merged_count(self, visual: int, grid: tuple[int, int]) -> int:
        """Visual tokens at the decoder input for an image of `visual` tokens on a (rows, cols) grid."""
        return visual if self.merge is None else self.merge.anchors(visual, grid)

    def resolve(self, visual: int) -> RoutingPlan:
        """Static plan for at most `visual` tokens a row after the merge; its caps are the counts of such a row."""
        if visual < 0:
            raise RerouteError(f"cannot plan for {visual} visual tokens, expected 0 or more")
        decisions = self.decisions
        _check_falling(f"count for {visual} visual tokens", decisions, self._wanted(visual))
        counts, stages, united = iter(self._counts(visual)), [], False
        for s in self.stages:
            if not s.decides:
                stages.append(StagePlan(s.lo, s.hi, None, None, None))
                continue
            keep, most, candidates = next(counts)
            stages.append(
                StagePlan(
                    s.lo,
                    s.hi,
                    most,
                    s.action,
                    s.score,
                    seed_cap=s.seeds(visual, keep),
                    floor=s.floor is not None,
                    keeps_seeds=s.floor is not None and not s.floor.fixed,
                    union=s.union,
                    share=s.ratio if united and s.of_kept else None,
                    repair=s.repair,
                    proxies=REPAIRS[s.repair].proxies(visual, candidates - keep),
                )
            )
            united |= s.union
        if decisions:
            stages[-1] = replace(stages[-1], action="delete", repair=None, proxies=0)
        return RoutingPlan(
            tuple(stages),
            self.position_mode,
            self.bidirectional_layer,
            self.cut_caches,
            self.renumbers_input,
            deepstack="running" if self.deepstack == "running" else "all",
        )

    def keep_counts(self, visual_counts: Sequence[int] | np.ndarray) -> np.ndarray:
        """int32 [decisions, B]: how many visual tokens each row keeps; 0 for a row without any (2.2)."""
        columns = [[keep for keep, *_ in self._counts(int(visual))] for visual in visual_counts]
        return np.array(columns, np.int32).reshape(len(columns), len(self.decisions)).T

    def seed_counts(self, visual_counts: Sequence[int] | np.ndarray) -> np.ndarray:
        """int32 [decisions, B]: how many tokens of each row a second pass looks from (13.3)."""
        keeps, decisions = self.keep_counts(visual_counts), self.decisions
        seeds = [
            [stage.seeds(int(visual), int(keep)) for visual, keep in zip(visual_counts, row, strict=True)]
            for stage, row in zip(decisions, keeps, strict=True)
        ]
        return np.array(seeds, np.int32).reshape(len(decisions), len(visual_counts))

    def _wanted(self, visual: int) -> list[int]:
        """Keep counts before any limit."""
        wanted = []
        for stage in self.decisions:
            wanted.append(stage.keep(visual, wanted[-1] if wanted else None))
        return wanted

    def _counts(self, visual: int) -> list[tuple[int, int, int]]:
        """Of every decision how many win by their scores, or stand in its floor, how many at most are kept, and of how
        many candidates."""
        counts, candidates, most = [], visual, None
        for stage in self.decisions:
            keep = min(stage.keep(visual, most), candidates)
            most = min(keep + stage.floor.most(visual, keep), candidates) if stage.union else keep
            counts.append((keep, most, candidates))
            candidates = most if stage.narrows else candidates
        return counts

    def to_record(self) -> dict[str, Any]:
        """JSON form; fractions stand as text, so that they stay exact."""
        return records.plain(self)

    @classmethod
    def from_record(cls, record: Any) -> Schedule:
        """What `to_record` gave. Raises RerouteError for anything else."""
        if not isinstance(record, Mapping):
            raise RerouteError(f"a schedule cannot be read from {str(record)[:40]!r}, expected its record")
        try:
            fields = dict(record)
            fields["stages"] = tuple(_stage(stage) for stage in fields["stages"])
            if fields.get("merge") is not None:
                fields["merge"] = records.made(MERGES[fields["merge"]["kind"]], fields["merge"])
            records.check_types(cls, fields, " of a schedule")
            return cls(**fields)
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise RerouteError(f"a schedule cannot be read from its record: {type(error).__name__}: {error}") from error

    def to_file(self, path: str | Path, about: Mapping[str, Any] | None = None) -> None:
        """Write the schedule as JSON. about: what else the file tells, such as how the schedule was found."""
        Path(path).write_text(json.dumps({"schedule": self.to_record(), **(about or {})}, indent=1) + "\n")

    @classmethod
    def from_file(cls, path: str | Path) -> Schedule:
        """What `to_file` wrote. Raises RerouteError, naming the file, for anything else."""
        try:
            record = json.loads(Path(path).read_text())["schedule"]
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise RerouteError(
                f"{path} is not a schedule file ({type(error).__name__}: {error}): give one that Schedule.to_file wrote"
            ) from error
        try:
            return cls.from_record(record)
        except RerouteError as error:
            raise RerouteError(f"{path}: {error}") from error


def floors(
    schedule: Schedule, grids: Sequence[Grid], positions: Int[np.ndarray, "C n"], config: DecoderConfig
) -> Bool[np.ndarray, "W n"]:
    """By decision the tokens of a row that its floor holds, seeds aside; no decisions where none has a floor.

    positions: of the row's original visual tokens. Raises RerouteError where a floor holds more than is kept.
    """
    visual = positions.shape[1]
    if not schedule.has_floor:
        return np.zeros((0, visual), bool)
    found = np.zeros((len(schedule.decisions), visual), bool)
    counts = schedule.keep_counts([visual])[:, 0].tolist()
    for own, stage, keep in zip(found, schedule.decisions, counts, strict=True):
        if stage.floor is None or not visual:
            continue
        own[:] = stage.floor.mask(grids, positions, keep, config)
        held = int(own.sum()) + stage.floor.seeds(visual, keep)
        most = stage.floor.most(visual, keep) if stage.union else keep
        if held > most:
            raise RerouteError(
                f"the floor of the decision at layer {stage.lo} holds {held} of {visual} visual tokens, and there is "
                f"room for {most}: raise the budget, or take a smaller floor"
            )
    return found


def _for_each(value: Any, count: int) -> list:
    return list(value) if isinstance(value, list | tuple) else [value] * count


def _amount(value: Real) -> dict[str, int | float | Fraction]:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise RerouteError(f"a decision keeps {value!r}, expected a whole number of tokens or a ratio in (0, 1]")
    if isinstance(value, Integral):
        return {"count": int(value)}
    return {"ratio": value if isinstance(value, Fraction) else float(value)}


def _stage(record: Mapping[str, Any]) -> Stage:
    floor = record.get("floor")
    made = None if floor is None else records.made(FLOORS[floor["kind"]], floor)
    return records.made(Stage, {**record, "floor": made})


def _check_falling(what: str, decisions: Sequence[Stage], values: Sequence[float | int | Fraction | None]) -> None:
    """No decision keeps more than one before it left for later ones. Values that are None do not count."""
    left = None
    for stage, value in zip(decisions, values, strict=True):
        if value is None:
            continue
        if left is not None and value > left:
            raise RerouteError(
                f"the keep {what} rises from {float(left):g} to {float(value):g}, but only tokens that were rerouted "
                "can return: use falling values, or action='reroute'"
            )
        left = value if stage.narrows else left
