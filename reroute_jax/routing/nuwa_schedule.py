"""Nuwa's schedule: a merge before the decoder, then decisions from the middle of its depth on (4.6, 4.7, 5, 6)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from reroute_jax.errors import RerouteError
from reroute_jax.routing.nuwa import NuwaMerge
from reroute_jax.routing.nuwa_rules import NuwaRules
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.request import PlanRequest
from reroute_jax.routing.solver import Ratio, decision_layers, scaled_layer, solve


def nuwa(request: PlanRequest) -> Schedule:
    """Merge to N1 anchors before the decoder, keep N2 from half its depth on (4.6, 4.7, 5); reroute as in section 6."""
    rules, switches = _rules(request), request.switches
    _check(request)
    share, kept, top_n = _shares(request, rules)
    merge = NuwaMerge(
        share,
        top_n,
        rules.quantile,
        rules.diagonal_radius,
        rules.self_weight_override and switches.self_weight_override,
        switches.qwen_sim_order,
    )
    layers, keep = _decisions(request, rules, merge, kept)
    return request.schedule(
        layers,
        keep,
        merge=merge,
        score=_scores(request, rules.host_score, len(layers)),
        bidirectional_layer=None if switches.qwen_layer14_causal else rules.half(request.num_layers) - 1,
    )


def _rules(request: PlanRequest) -> NuwaRules:
    if request.nuwa is None:
        raise RerouteError(
            f"method 'nuwa' has no rules for the model family {request.family}, which it was not released for: "
            "choose another method"
        )
    return request.nuwa


def _check(request: PlanRequest) -> None:
    switches = request.switches
    if switches.keep_ratio is None and request.budget > Fraction(4, 7):
        raise RerouteError(f"method 'nuwa' averages at most 4/7 of the visual tokens, not {float(request.budget):.4g}")
    switches.check_action("nuwa", request.action)
    if switches.variant is not None and switches.decisions is not None:
        raise RerouteError("variant and decisions both set the decision layers of method 'nuwa', give one of them")
    if switches.keep_ratio is not None and (switches.variant is not None or switches.decisions is not None):
        raise RerouteError(
            "keep_ratio belongs to the decision layers of method 'nuwa', leave out variant and decisions"
        )


def _shares(request: PlanRequest, rules: NuwaRules) -> tuple[Fraction, Ratio, int]:
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


def _decisions(
    request: PlanRequest, rules: NuwaRules, merge: NuwaMerge, kept: Ratio
) -> tuple[Sequence[int], Sequence[Ratio | int]]:
    """Decision layers, and shares of the merged tokens, or counts where the rules fix them."""
    switches, depth = request.switches, request.num_layers
    pool = merge.anchors(request.visual, request.grid)
    layers, ratios = _layers(request, rules.half(depth)), None
    if switches.decisions is not None or switches.variant is not None:
        shape = switches.variant or "flat"
        average = request.average if rules.fixed_counts else Fraction(4, 7) * pool
        ratios = solve(shape, layers, depth, pool, average)
    if not rules.fixed_counts:
        return layers, ratios or [kept] * len(layers)
    if ratios is not None:
        return layers, [max(1, int(pool * ratio)) for ratio in ratios]
    return layers, [max(1, round(Fraction(pool, 7)))] * len(layers)


def _layers(request: PlanRequest, half: int) -> Sequence[int]:
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


def _scores(request: PlanRequest, host: str, decisions: int) -> list[str]:
    """The host ranks by the previous layer; under reroute only the first decision can (6)."""
    switches = request.switches
    if request.action == "delete":
        return [host if switches.score_source != "own_layer" else "last_token"] * decisions
    first = host if switches.nuwa_first_score == "host" else "last_token"
    return [first] + ["last_token"] * (decisions - 1)
