"""Routing methods by name. A new method is one small factory and one line in `METHODS`; its switches are declared in
`switches.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from numbers import Integral, Real

from reroute_jax.errors import RerouteError, one_of
from reroute_jax.models import FAMILIES
from reroute_jax.routing.budget import TIERS, parsed_budget, share_of
from reroute_jax.routing.decoder_methods import feather, ivc, swiftvlm, v2drop
from reroute_jax.routing.divprune import DivPrune
from reroute_jax.routing.downsample import Downsample
from reroute_jax.routing.hiprune import HiPrune
from reroute_jax.routing.nuwa_schedule import nuwa
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.pool import PoolMerge
from reroute_jax.routing.request import PlanRequest
from reroute_jax.routing.solver import OFFICIAL_RATIOS, decision_layers, solve
from reroute_jax.routing.stages import ACTIONS
from reroute_jax.routing.switches import SWITCHES, Switches, shown
from reroute_jax.routing.visionzip import VisionZip

_SCORES = {None: "last_token", "own_layer": "last_token", "previous_layer": "previous_layer"}


def plan(
    method: str,
    *,
    num_layers: int,
    visual: int,
    grid: tuple[int, int],
    family: str = "llava",
    budget: int | float | Fraction | str | None = None,
    action: str = "reroute",
    **switches,
) -> Schedule:
    """Schedule of a method for a decoder of `num_layers` layers and images of `visual` tokens on a (rows, cols) grid.

    For images of varying size, those of a typical one: ratios do not depend on it, each row's counts follow its own.
    family: the model's, one of `models.FAMILIES`; "nuwa" follows its rules. budget: 192, 128 or 64 (1/3, 2/9, 1/9 of an
    image's visual tokens, averaged over all decoder layers) or a share in (0, 1), as a number or a string like "2/9".
    action: "delete", "reroute", or "layout" (reroute where a token once deferred may not return). "none" uses neither,
    and reductions before the decoder only the budget. switches: fields of `Switches`, each explained there and refused
    where the method has no use for it; of `keep` and `layers` a single number will do.

    Raises RerouteError for unknown names, switches that do not apply, and budgets out of reach.
    """
    one_of("method", method, tuple(METHODS))
    one_of("action", action, ACTIONS)
    if not all(isinstance(size, Integral) for size in (visual, *grid)):
        raise RerouteError(f"a grid of {grid[0]} x {grid[1]} for {visual} visual tokens, expected whole numbers")
    if visual < 1 or grid[0] * grid[1] != visual:
        raise RerouteError(f"a grid of {grid[0]} x {grid[1]} does not hold {visual} visual tokens")
    one_of("family", family, tuple(FAMILIES))
    for name in switches:
        one_of("switch", name, tuple(SWITCHES))
    switches = {name: tuple(value) if isinstance(value, list) else value for name, value in switches.items()}
    for name in ("keep", "layers"):
        if isinstance(switches.get(name), Real):
            switches[name] = (switches[name],)
    given, known = Switches(**switches), METHODS[method]
    given.check(method, family)
    if given.amount is not None and budget is not None:
        raise RerouteError(f"budget and {given.amount} both set how much method {method!r} keeps, give one of them")
    needs_budget = known.has_budget and given.amount is None
    budget = parsed_budget(budget) if isinstance(budget, str) else budget
    share = share_of(budget, visual) if needs_budget else Fraction(1)
    tier = int(budget) if needs_budget and budget in TIERS else None
    asked = str(tier or f"{float(share):.4g}") if needs_budget else None
    label = _label(method, action if known.has_actions else None, asked, given)
    rules = FAMILIES[family].nuwa
    return known.build(PlanRequest(method, family, rules, num_layers, visual, grid, share, tier, action, given, label))


def _label(method: str, action: str | None, budget: str | None, switches: Switches) -> str:
    """Method, action and budget, then what was asked to be different."""
    parts = [part for part in (method, action, budget) if part is not None]
    for name in switches.changed:
        value = getattr(switches, name)
        telling = name in ("decisions", "ratios", "position_mode", "variant")
        parts.append(value if telling else f"{name}={shown(value)}")
    return " ".join(parts)


def _solved(request: PlanRequest, shape: str, layers: Sequence[int], **more) -> Schedule:
    """Decisions of a shape at its own layers, or at every K-th layer, with official or solved ratios."""
    switches = request.switches
    if switches.ratios == "official":
        if request.tier is None:
            raise RerouteError(f"ratios='official' exist for the budgets {', '.join(map(str, TIERS))} only")
        return request.schedule(layers, OFFICIAL_RATIOS[shape][request.tier][: len(layers)], **more)
    if switches.decisions is not None:
        shape, layers = "flat", tuple(range(layers[0], request.num_layers, switches.step))
    return request.schedule(layers, solve(shape, layers, request.num_layers, request.visual, request.average), **more)


def _own_layers(request: PlanRequest, shape: str) -> tuple[int, ...]:
    return decision_layers(shape, request.num_layers, request.switches.first_decision)


def _none(request: PlanRequest) -> Schedule:
    return request.schedule((), ())


def _flat(request: PlanRequest, **more) -> Schedule:
    layers = _own_layers(request, "flat")
    return _solved(request, "flat", layers[:1] if request.action == "delete" else layers, **more)


def _fastv(request: PlanRequest) -> Schedule:
    """Deletion: one decision. Reroute: `ours_vs_fastv`, the same ratio at four decisions (7.3)."""
    return _flat(request, score=_SCORES[request.switches.score_source])


def _pdrop(request: PlanRequest) -> Schedule:
    """Deletion: geometric ratios. Reroute: `ours_vs_pdrop`, the pyramid (7.3)."""
    shape = "geometric" if request.action == "delete" else "pyramid"
    return _solved(request, shape, _own_layers(request, shape), score=_SCORES[request.switches.score_source])


def _random(request: PlanRequest) -> Schedule:
    return _flat(request, score="prior", prior="random", seed=request.switches.seed)


def _uniform(request: PlanRequest) -> Schedule:
    return _flat(request, score="prior", prior="uniform")


def _pool(request: PlanRequest) -> Schedule:
    """Average pooling to the budget before the decoder, no decisions."""
    return request.schedule((), (), merge=PoolMerge(request.budget))


def _amount(request: PlanRequest) -> dict[str, Fraction | int]:
    """What a reduction before the decoder keeps of an image."""
    if request.switches.keep is None:
        return {"share": request.budget}
    if len(request.switches.keep) != 1:
        raise RerouteError(f"method {request.method!r} keeps one number of tokens, not {shown(request.switches.keep)}")
    (keep,) = request.switches.keep
    return {"count": int(keep)} if isinstance(keep, Integral) else {"share": Fraction(keep).limit_denominator(10**6)}


def _downsample(request: PlanRequest) -> Schedule:
    """A smaller image, no decisions."""
    square = FAMILIES[request.family].one_grid
    return request.schedule((), (), merge=Downsample(**_amount(request), square=square, blur=request.switches.blur))


def _divprune(request: PlanRequest) -> Schedule:
    return request.schedule((), (), merge=DivPrune(**_amount(request)))


def _hiprune(request: PlanRequest) -> Schedule:
    return request.schedule((), (), merge=HiPrune(**_amount(request), neighbours=request.switches.neighbours))


def _visionzip(request: PlanRequest) -> Schedule:
    return request.schedule((), (), merge=VisionZip(**_amount(request), cls=request.switches.cls))


def _layout(request: PlanRequest) -> Schedule:
    """PDrop's reroute where a token once deferred may not return: isolates what recovery is worth."""
    if request.action == "delete":
        raise RerouteError("method 'layout' is reroute without recovery, it has no action='delete'")
    return _solved(replace(request, action="layout"), "pyramid", _own_layers(request, "pyramid"))


@dataclass(frozen=True)
class Method:
    """A factory, and whether a budget, and deletion or reroute, mean anything to it."""

    build: Callable[[PlanRequest], Schedule]
    has_actions: bool = True
    has_budget: bool = True


METHODS: dict[str, Method] = {
    "none": Method(_none, has_actions=False, has_budget=False),
    "fastv": Method(_fastv),
    "pdrop": Method(_pdrop),
    "nuwa": Method(nuwa),
    "random": Method(_random),
    "uniform": Method(_uniform),
    "pool": Method(_pool, has_actions=False),
    "downsample": Method(_downsample, has_actions=False),
    "layout": Method(_layout, has_actions=False),
    "divprune": Method(_divprune, has_actions=False),
    "hiprune": Method(_hiprune, has_actions=False),
    "visionzip": Method(_visionzip, has_actions=False),
    "feather": Method(feather),
    "v2drop": Method(v2drop),
    "ivc": Method(ivc),
    "swiftvlm": Method(swiftvlm, has_actions=False),
}
