"""Routing methods by name. A new method is one small factory and one line in `METHODS`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction

from reroute_jax.errors import RerouteError, one_of
from reroute_jax.routing.plan import ACTIONS, POSITION_MODES, SIM_ORDERS, NuwaMerge, PoolMerge, Schedule
from reroute_jax.routing.solver import OFFICIAL_RATIOS, Ratio, decision_layers, scaled_layer, solve

# The tiers of the papers, named by their tokens of LLaVA-1.5's 576, as shares of an image's own visual tokens.
TIERS = {192: Fraction(1, 3), 128: Fraction(2, 9), 64: Fraction(1, 9)}

_SCORE_SOURCES = {"own_layer": "last_token", "previous_layer": "previous_layer"}


@dataclass(frozen=True)
class NuwaRules:
    """How Nuwa differs between the releases (sections 4 and 5).

    host_score: of its decision. quantile, diagonal_radius, self_weight_override: of its merge. first: layer of a
    decoder of `depth` layers before which it decides. released: keep ratio -> (share after the merge, share
    of those kept by the decision, candidates per region).
    """

    host_score: str
    quantile: Fraction
    diagonal_radius: bool
    self_weight_override: bool
    first: int
    depth: int
    released: Mapping[float, tuple[Fraction, float, int]]

    def half(self, num_layers: int) -> int:
        return self.first * num_layers // self.depth


NUWA_RULES = {
    "llava": NuwaRules("previous_layer", Fraction(11, 20), False, True, 16, 32, {}),
    "qwen2_5_vl": NuwaRules(
        "previous_layer_last_three",
        Fraction(1, 10),
        True,
        False,
        15,
        28,
        {
            0.25: (Fraction(35, 100), 0.42, 3),
            0.5: (Fraction(60, 100), 0.66, 3),
            0.75: (Fraction(85, 100), 0.70, 4),
        },
    ),
}


@dataclass(frozen=True)
class Switches:
    """What a method may be asked to do differently; `plan` explains each."""

    decisions: str | None = None
    first_decision: int | None = None
    ratios: str = "solved"
    score_source: str | None = None
    position_mode: str = "original"
    variant: str | None = None
    nuwa_first_score: str = "own_layer"
    self_weight_override: bool = True
    keep_ratio: float | None = None
    qwen_sim_order: str = "raster"
    qwen_layer14_causal: bool = True
    seed: int = 0
    first_image_only: bool = False

    def __post_init__(self) -> None:
        one_of("ratios", self.ratios, ("solved", "official"))
        one_of("position_mode", self.position_mode, POSITION_MODES)
        one_of("nuwa_first_score", self.nuwa_first_score, ("own_layer", "host"))
        one_of("qwen_sim_order", self.qwen_sim_order, SIM_ORDERS)
        if self.score_source is not None:
            one_of("score_source", self.score_source, tuple(_SCORE_SOURCES))
        if self.variant is not None:
            one_of("variant", self.variant, ("flat", "pyramid"))
        if self.decisions is not None and not re.fullmatch(r"every(:[1-9]\d*)?", self.decisions):
            raise RerouteError(f"decisions is {self.decisions!r}, expected 'every' or 'every:K' with K from 1 on")
        if self.ratios == "official" and (self.decisions is not None or self.first_decision is not None):
            raise RerouteError("ratios='official' belongs to a method's own decisions, use ratios='solved' here")

    @property
    def step(self) -> int:
        """Layers between two decisions of `decisions`."""
        return int(self.decisions.partition(":")[2] or 1)

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the switches that do not stand at their default."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) != field.default)


@dataclass(frozen=True)
class Request:
    """One call of `plan`, checked. budget: share of the visual tokens; tier: its name where it has one."""

    method: str
    family: str
    num_layers: int
    visual: int
    grid: tuple[int, int]
    budget: Fraction
    tier: int | None
    action: str
    switches: Switches

    @property
    def average(self) -> Fraction:
        """Visual tokens per decoder layer."""
        return self.budget * self.visual

    @property
    def score(self) -> str:
        return _SCORE_SOURCES[self.switches.score_source or "own_layer"]

    def schedule(self, layers: Sequence[int], keep: Sequence[Ratio | int], **more) -> Schedule:
        """The schedule of these decisions under the request's action, position mode and label."""
        return Schedule.from_decisions(
            layers,
            keep,
            self.num_layers,
            self.action,
            position_mode=self.switches.position_mode,
            first_image_only=self.switches.first_image_only,
            label=self._label(),
            **more,
        )

    def _label(self) -> str:
        """Method, action and budget, then what was asked to be different."""
        method = METHODS[self.method]
        parts = [self.method]
        if method.has_actions:
            parts.append(self.action)
        if method.has_budget and self.switches.keep_ratio is None:
            parts.append(str(self.tier or f"{float(self.budget):.4g}"))
        for name in self.switches.changed:
            value = getattr(self.switches, name)
            telling = name in ("decisions", "ratios", "position_mode", "variant")
            parts.append(value if telling else f"{name}={value}")
        return " ".join(parts)


def plan(
    method: str,
    *,
    num_layers: int,
    visual: int,
    grid: tuple[int, int],
    family: str = "llava",
    budget: int | float | Fraction | None = None,
    action: str = "reroute",
    **switches,
) -> Schedule:
    """Schedule of a method for a decoder of `num_layers` layers and images of `visual` tokens on a (rows, cols) grid.

    For images of varying size, those of a typical one: ratios do not depend on it, each row's counts follow its own.
    family: whose rules "nuwa" follows, "llava" or "qwen2_5_vl". budget: 192, 128 or 64 (1/3, 2/9, 1/9 of the image's
    visual tokens, averaged over all decoder layers) or a share in (0, 1). action: "delete" or "reroute". "none" uses
    neither and "pool" only the budget.

    Switches, each refused where a method has no use for it:
    decisions: "every" or "every:K", decide at each K-th layer from the method's first decision on, flat solved ratio.
    first_decision: layer of the first one (the K of FastV), instead of the released 2 or 3.
    ratios: "solved" for this depth and budget, or "official", the released ones (tiers only).
    score_source: "own_layer" or "previous_layer" attention (3.5), the latter for deletions; default as released.
    position_mode: "original", or "renumber" after each decision.
    variant: Nuwa's reroute as "flat" or "pyramid" (6); nuwa_first_score: "own_layer" or "host" at its first decision;
    self_weight_override: False drops the overwritten self weight of its merge on LLaVA (4.3).
    keep_ratio: instead of a budget, one of the ratios that Nuwa released for Qwen, 0.25, 0.5 or 0.75 (5.1);
    qwen_sim_order: "window" and qwen_layer14_causal: False reproduce two defects of that release (5.2, 5.4).
    seed: of the method "random".
    first_image_only: of several images in a row, route the first one only.

    Raises RerouteError for unknown names, switches that do not apply, and budgets out of reach.
    """
    one_of("method", method, tuple(METHODS))
    one_of("action", action, ACTIONS)
    if visual < 1 or grid[0] * grid[1] != visual:
        raise RerouteError(f"a grid of {grid[0]} x {grid[1]} does not hold {visual} visual tokens")
    for name in switches:
        one_of("switch", name, tuple(field.name for field in fields(Switches)))
    given = Switches(**switches)
    known = METHODS[method]
    for name in given.changed:
        if name not in known.switches:
            users = ", ".join(repr(other) for other, entry in METHODS.items() if name in entry.switches)
            raise RerouteError(f"method {method!r} has no use for {name}={getattr(given, name)!r}, it is for {users}")
    one_of("family", family, tuple(NUWA_RULES))
    if given.keep_ratio is not None and budget is not None:
        raise RerouteError("budget and keep_ratio both set how much method 'nuwa' keeps, give one of them")
    needs_budget = known.has_budget and given.keep_ratio is None
    share = _share(budget, visual) if needs_budget else Fraction(1)
    tier = int(budget) if budget in TIERS else None
    return known.build(Request(method, family, num_layers, visual, grid, share, tier, action, given))


def _share(budget: int | float | Fraction | None, visual: int) -> Fraction:
    if budget in TIERS:
        share = TIERS[budget]
    elif budget is None or not 0 < budget < 1:
        raise RerouteError(f"budget is {budget}, expected one of {', '.join(map(str, TIERS))} or a share in (0, 1)")
    else:
        # 0.15 means 15/100 and not its binary neighbour; likewise 1 / 3.
        share = Fraction(budget).limit_denominator(10**6)
    if share * visual < 1:
        raise RerouteError(f"a budget of {float(share):.4g} leaves fewer than one of {visual} visual tokens, raise it")
    return share


def _solved(request: Request, shape: str, layers: Sequence[int], **more) -> Schedule:
    """Decisions of a shape at its own layers, or at every K-th layer, with official or solved ratios."""
    switches = request.switches
    if switches.ratios == "official":
        if request.tier is None:
            raise RerouteError(f"ratios='official' exist for the budgets {', '.join(map(str, TIERS))} only")
        return request.schedule(layers, OFFICIAL_RATIOS[shape][request.tier][: len(layers)], **more)
    if switches.decisions is not None:
        shape, layers = "flat", tuple(range(layers[0], request.num_layers, switches.step))
    return request.schedule(layers, solve(shape, layers, request.num_layers, request.visual, request.average), **more)


def _own_layers(request: Request, shape: str) -> tuple[int, ...]:
    return decision_layers(shape, request.num_layers, request.switches.first_decision)


def _none(request: Request) -> Schedule:
    return request.schedule((), ())


def _flat(request: Request, **more) -> Schedule:
    layers = _own_layers(request, "flat")
    return _solved(request, "flat", layers[:1] if request.action == "delete" else layers, **more)


def _fastv(request: Request) -> Schedule:
    """Deletion: one decision. Reroute: `ours_vs_fastv`, the same ratio at four decisions (7.3)."""
    return _flat(request, score=request.score)


def _pdrop(request: Request) -> Schedule:
    """Deletion: geometric ratios. Reroute: `ours_vs_pdrop`, the pyramid (7.3)."""
    shape = "geometric" if request.action == "delete" else "pyramid"
    return _solved(request, shape, _own_layers(request, shape), score=request.score)


def _nuwa(request: Request) -> Schedule:
    """Merge to N1 anchors before the decoder, keep N2 from half its depth on (4.6, 4.7, 5); reroute as in section 6."""
    _check_nuwa(request)
    rules, switches = NUWA_RULES[request.family], request.switches
    share, kept, top_n = _nuwa_shares(request, rules)
    merge = NuwaMerge(
        share,
        top_n,
        rules.quantile,
        rules.diagonal_radius,
        rules.self_weight_override and switches.self_weight_override,
        switches.qwen_sim_order,
    )
    layers, keep = _nuwa_decisions(request, rules.half(request.num_layers), merge, kept)
    return request.schedule(
        layers,
        keep,
        merge=merge,
        score=_nuwa_scores(request, rules.host_score, len(layers)),
        bidirectional_layer=None if switches.qwen_layer14_causal else rules.half(request.num_layers) - 1,
    )


def _check_nuwa(request: Request) -> None:
    switches = request.switches
    if switches.keep_ratio is None and request.budget > Fraction(4, 7):
        raise RerouteError(f"method 'nuwa' averages at most 4/7 of the visual tokens, not {float(request.budget):.4g}")
    if request.action == "delete" and (switches.variant is not None or switches.nuwa_first_score != "own_layer"):
        raise RerouteError("variant and nuwa_first_score belong to action='reroute', leave them out of a deletion")
    if request.action == "reroute" and switches.score_source is not None:
        raise RerouteError("score_source of method 'nuwa' belongs to action='delete', here use nuwa_first_score")
    if switches.variant is not None and switches.decisions is not None:
        raise RerouteError("variant and decisions both set the decision layers of method 'nuwa', give one of them")
    if switches.keep_ratio is not None and (switches.variant is not None or switches.decisions is not None):
        raise RerouteError(
            "keep_ratio belongs to the decision layers of method 'nuwa', leave out variant and decisions"
        )
    alone = {"llava": ("self_weight_override",), "qwen2_5_vl": ("keep_ratio", "qwen_sim_order", "qwen_layer14_causal")}
    for family, names in alone.items():
        for name in set(names) & set(switches.changed):
            if family != request.family:
                raise RerouteError(f"{name} of method 'nuwa' is for {family}, this model is {request.family}")


def _nuwa_shares(request: Request, rules: NuwaRules) -> tuple[Fraction, Ratio, int]:
    """(share of the tokens after the merge, share of those that the decision keeps, candidates per region)."""
    ratio, depth = request.switches.keep_ratio, request.num_layers
    if ratio is not None:
        if ratio not in rules.released:
            known = ", ".join(map(str, rules.released))
            raise RerouteError(f"keep_ratio is {ratio}, expected one that was released: {known}; or give a budget")
        return rules.released[ratio]
    share, half = Fraction(7, 4) * request.budget, rules.half(depth)
    # What makes the average over all layers the budget: 1/7 with half the layers before the decision, 1/13 on Qwen.
    kept = (depth * request.budget - half * share) / ((depth - half) * share)
    top_n = next((i for i in (1, 2, 3) if request.budget <= Fraction(i, 9)), 4)
    return share, kept, top_n


def _nuwa_decisions(
    request: Request, half: int, merge: NuwaMerge, kept: Ratio
) -> tuple[Sequence[int], Sequence[Ratio | int]]:
    """Decision layers, and shares of the merged tokens (counts on LLaVA, where every image has as many)."""
    switches, depth = request.switches, request.num_layers
    pool = merge.anchors(request.visual, request.grid)
    layers, ratios = _nuwa_layers(request, half), None
    if switches.decisions is not None or switches.variant is not None:
        shape = switches.variant or "flat"
        average = request.average if request.family == "llava" else Fraction(4, 7) * pool
        ratios = solve(shape, layers, depth, pool, average)
    if request.family != "llava":
        return layers, ratios or [kept] * len(layers)
    if ratios is not None:
        return layers, [max(1, int(pool * ratio)) for ratio in ratios]
    return layers, [max(1, round(Fraction(pool, 7)))] * len(layers)


def _nuwa_layers(request: Request, half: int) -> Sequence[int]:
    switches, depth = request.switches, request.num_layers
    if switches.decisions is not None:
        return range(half, depth, switches.step)
    if switches.variant is not None:
        return decision_layers(switches.variant, depth)
    if request.action == "delete":
        return [half]
    second = max(half + 1, scaled_layer(23, depth))
    if second >= depth:
        raise RerouteError(
            f"method 'nuwa' with action='reroute' needs two decisions, a decoder of {depth} layers has one"
        )
    return [half, second]


def _nuwa_scores(request: Request, host: str, decisions: int) -> list[str]:
    """The host ranks by the previous layer; under reroute only the first decision can (6)."""
    switches = request.switches
    if request.action == "delete":
        return [host if switches.score_source != "own_layer" else "last_token"] * decisions
    first = host if switches.nuwa_first_score == "host" else "last_token"
    return [first] + ["last_token"] * (decisions - 1)


def _random(request: Request) -> Schedule:
    return _flat(request, score="prior", prior="random", seed=request.switches.seed)


def _uniform(request: Request) -> Schedule:
    return _flat(request, score="prior", prior="uniform")


def _pool(request: Request) -> Schedule:
    """Average pooling to the budget before the decoder, no decisions."""
    return request.schedule((), (), merge=PoolMerge(request.budget))


def _layout(request: Request) -> Schedule:
    """PDrop's reroute where a token once deferred may not return: isolates what recovery is worth."""
    if request.action == "delete":
        raise RerouteError("method 'layout' is reroute without recovery, it has no action='delete'")
    return _solved(request, "pyramid", _own_layers(request, "pyramid"), monotonic=True)


@dataclass(frozen=True)
class Method:
    """A factory, the switches it knows, and whether a budget, and deletion or reroute, mean anything to it."""

    build: Callable[[Request], Schedule]
    switches: frozenset[str] = frozenset()
    has_actions: bool = True
    has_budget: bool = True


_ROUTED = frozenset({"decisions", "position_mode", "first_image_only"})
_STAGED = _ROUTED | {"first_decision", "ratios"}
_NUWA = frozenset({"score_source", "variant", "nuwa_first_score", "self_weight_override", "keep_ratio"})
_NUWA_DEFECTS = frozenset({"qwen_sim_order", "qwen_layer14_causal"})

METHODS: dict[str, Method] = {
    "none": Method(_none, has_actions=False, has_budget=False),
    "fastv": Method(_fastv, _STAGED | {"score_source"}),
    "pdrop": Method(_pdrop, _STAGED | {"score_source"}),
    "nuwa": Method(_nuwa, _ROUTED | _NUWA | _NUWA_DEFECTS),
    "random": Method(_random, _STAGED | {"seed"}),
    "uniform": Method(_uniform, _STAGED),
    "pool": Method(_pool, frozenset({"position_mode"}), has_actions=False),
    "layout": Method(_layout, _STAGED, has_actions=False),
}
