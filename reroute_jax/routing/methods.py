"""Routing methods by name. A new method is one small factory and one line in `METHODS`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction

from reroute_jax.errors import RerouteError
from reroute_jax.routing.plan import ACTIONS, POSITION_MODES, NuwaMerge, PoolMerge, Schedule, one_of
from reroute_jax.routing.solver import OFFICIAL_RATIOS, Ratio, decision_layers, pool_grid, scaled_layer, solve

# The tiers of the papers, named by their tokens of LLaVA-1.5's 576, as shares of an image's own visual tokens.
TIERS = {192: Fraction(1, 3), 128: Fraction(2, 9), 64: Fraction(1, 9)}

_SCORE_SOURCES = {"own_layer": "last_token", "previous_layer": "previous_layer"}


@dataclass(frozen=True)
class Switches:
    """What a method may be asked to do differently; `plan` explains each."""

    decisions: str | None = None
    ratios: str = "solved"
    score_source: str | None = None
    position_mode: str = "original"
    variant: str | None = None
    nuwa_first_score: str = "own_layer"
    self_weight_override: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("ratios", self.ratios, ("solved", "official"))
        one_of("position_mode", self.position_mode, POSITION_MODES)
        one_of("nuwa_first_score", self.nuwa_first_score, ("own_layer", "host"))
        if self.score_source is not None:
            one_of("score_source", self.score_source, tuple(_SCORE_SOURCES))
        if self.variant is not None:
            one_of("variant", self.variant, ("flat", "pyramid"))
        if self.decisions is not None and not re.fullmatch(r"every(:[1-9]\d*)?", self.decisions):
            raise RerouteError(f"decisions is {self.decisions!r}, expected 'every' or 'every:K' with K from 1 on")
        if self.ratios == "official" and self.decisions is not None:
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
            label=self._label(),
            **more,
        )

    def _label(self) -> str:
        """Method, action and budget, then what was asked to be different."""
        method = METHODS[self.method]
        parts = [self.method]
        if method.has_actions:
            parts.append(self.action)
        if method.has_budget:
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
    budget: int | float | Fraction | None = None,
    action: str = "reroute",
    **switches,
) -> Schedule:
    """Schedule of a method for a decoder of `num_layers` layers and images of `visual` tokens on a (rows, cols) grid.

    budget: 192, 128 or 64 (1/3, 2/9, 1/9 of the image's visual tokens, averaged over all decoder layers) or a share in
    (0, 1). action: "delete" or "reroute". "none" uses neither and "pool" only the budget.

    Switches, each refused where a method has no use for it:
    decisions: "every" or "every:K", decide at each K-th layer from the method's first decision on, flat solved ratio.
    ratios: "solved" for this depth and budget, or "official", the released ones (tiers only).
    score_source: "own_layer" or "previous_layer" attention (3.5), the latter for deletions; default as released.
    position_mode: "original", or "renumber" after each decision.
    variant: Nuwa's reroute as "flat" or "pyramid" (6); nuwa_first_score: "own_layer" or "host" at its first decision;
    self_weight_override: False drops the overwritten self weight of its merge (4.3).
    seed: of the method "random".

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
    share = _share(budget, visual) if known.has_budget else Fraction(1)
    tier = int(budget) if budget in TIERS else None
    return known.build(Request(method, num_layers, visual, grid, share, tier, action, given))


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


def _none(request: Request) -> Schedule:
    return request.schedule((), ())


def _flat(request: Request, **more) -> Schedule:
    layers = decision_layers("flat", request.num_layers)
    return _solved(request, "flat", layers[:1] if request.action == "delete" else layers, **more)


def _fastv(request: Request) -> Schedule:
    """Deletion: one decision. Reroute: `ours_vs_fastv`, the same ratio at four decisions (7.3)."""
    return _flat(request, score=request.score)


def _pdrop(request: Request) -> Schedule:
    """Deletion: geometric ratios. Reroute: `ours_vs_pdrop`, the pyramid (7.3)."""
    shape = "geometric" if request.action == "delete" else "pyramid"
    return _solved(request, shape, decision_layers(shape, request.num_layers), score=request.score)


def _nuwa(request: Request) -> Schedule:
    """Merge to N1 anchors before the decoder, keep N2 from half its depth on (4.6, 4.7); reroute as in section 6."""
    _check_nuwa(request)
    merge = NuwaMerge(request.budget, request.switches.self_weight_override)
    layers, keep = _nuwa_decisions(request, merge.anchors(request.visual, request.grid))
    return request.schedule(layers, keep, merge=merge, score=_nuwa_scores(request, len(layers)))


def _check_nuwa(request: Request) -> None:
    switches = request.switches
    if request.budget > Fraction(4, 7):
        raise RerouteError(f"method 'nuwa' averages at most 4/7 of the visual tokens, not {float(request.budget):.4g}")
    if request.action == "delete" and (switches.variant is not None or switches.nuwa_first_score != "own_layer"):
        raise RerouteError("variant and nuwa_first_score belong to action='reroute', leave them out of a deletion")
    if request.action == "reroute" and switches.score_source is not None:
        raise RerouteError("score_source of method 'nuwa' belongs to action='delete', here use nuwa_first_score")
    if switches.variant is not None and switches.decisions is not None:
        raise RerouteError("variant and decisions both set the decision layers of method 'nuwa', give one of them")


def _nuwa_decisions(request: Request, pool: int) -> tuple[Sequence[int], Sequence[int]]:
    """Decision layers and counts for `pool` merged tokens."""
    switches, depth, half = request.switches, request.num_layers, request.num_layers // 2
    if switches.decisions is not None or switches.variant is not None:
        if switches.decisions is not None:
            shape, layers = "flat", range(half, depth, switches.step)
        else:
            shape, layers = switches.variant, decision_layers(switches.variant, depth)
        ratios = solve(shape, layers, depth, pool, request.average)
        return layers, [max(1, int(pool * ratio)) for ratio in ratios]
    count = max(1, round(Fraction(pool, 7)))
    if request.action == "delete":
        return [half], [count]
    second = max(half + 1, scaled_layer(23, depth))
    if second >= depth:
        raise RerouteError(
            f"method 'nuwa' with action='reroute' needs two decisions, a decoder of {depth} layers has one"
        )
    return [half, second], [count, count]


def _nuwa_scores(request: Request, decisions: int) -> list[str]:
    """The host ranks by the previous layer; under reroute only the first decision can (6)."""
    switches = request.switches
    if request.action == "delete":
        return [_SCORE_SOURCES[switches.score_source or "previous_layer"]] * decisions
    first = "previous_layer" if switches.nuwa_first_score == "host" else "last_token"
    return [first] + ["last_token"] * (decisions - 1)


def _random(request: Request) -> Schedule:
    return _flat(request, score="prior", prior="random", seed=request.switches.seed)


def _uniform(request: Request) -> Schedule:
    return _flat(request, score="prior", prior="uniform")


def _pool(request: Request) -> Schedule:
    """Average pooling to the budget before the decoder, no decisions."""
    return request.schedule((), (), merge=PoolMerge(*pool_grid(request.grid, int(request.average))))


def _layout(request: Request) -> Schedule:
    """PDrop's reroute where a token once deferred may not return: isolates what recovery is worth."""
    if request.action == "delete":
        raise RerouteError("method 'layout' is reroute without recovery, it has no action='delete'")
    return _solved(request, "pyramid", decision_layers("pyramid", request.num_layers), monotonic=True)


@dataclass(frozen=True)
class Method:
    """A factory, the switches it knows, and whether a budget, and deletion or reroute, mean anything to it."""

    build: Callable[[Request], Schedule]
    switches: frozenset[str] = frozenset()
    has_actions: bool = True
    has_budget: bool = True


_ROUTED = frozenset({"decisions", "position_mode"})

METHODS: dict[str, Method] = {
    "none": Method(_none, has_actions=False, has_budget=False),
    "fastv": Method(_fastv, _ROUTED | {"ratios", "score_source"}),
    "pdrop": Method(_pdrop, _ROUTED | {"ratios", "score_source"}),
    "nuwa": Method(_nuwa, _ROUTED | {"score_source", "variant", "nuwa_first_score", "self_weight_override"}),
    "random": Method(_random, _ROUTED | {"ratios", "seed"}),
    "uniform": Method(_uniform, _ROUTED | {"ratios"}),
    "pool": Method(_pool, frozenset({"position_mode"}), has_actions=False),
    "layout": Method(_layout, _ROUTED | {"ratios"}, has_actions=False),
}
