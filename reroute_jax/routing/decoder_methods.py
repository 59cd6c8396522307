"""FEATHER, V2Drop, IVC-Prune and SwiftVLM: methods of one or more decisions inside the decoder, at any budget and
depth (17)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

from reroute_jax.errors import RerouteError
from reroute_jax.routing.floors import RotaryAnchors, StrideGrid, stride_grid
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.repair import ProxyOffset
from reroute_jax.routing.request import PlanRequest
from reroute_jax.routing.solver import scaled_layer

# FEATHER keeps the square of its first ratio, 3/10, at its second decision (17).
_SECOND = Fraction(9, 100)


def feather(request: PlanRequest) -> Schedule:
    """Attention without rotation over the visual tokens, a grid of every `stride`-th token first (13.2, 14.1).

    FEATHER (ICCV 2025): two decisions, the second twice as deep as the first; it keeps 9 % of what the first
    kept, and its grid tokens compete like others.
    """
    switches, depth = request.switches, request.num_layers
    switches.check_action(request.method, request.action)
    own = request.action != "delete" or switches.score_source == "own_layer"
    first = _late_start(request, max(1, depth // 4))
    layers = switches.layers or (first, 2 * first)
    floor = StrideGrid(switches.stride)
    held = int(stride_grid(request.grid, floor.stride).sum())
    union = switches.floor_count == "union"
    if switches.keep:
        keep, of_kept = switches.keep, False
    else:
        span = _spans(layers, 2, depth)
        share = _share(request, layers[0], span[0] + _SECOND * span[1])
        count = int(request.visual * share)
        if count < held + union:
            raise RerouteError(
                f"method 'feather' keeps {count} of {request.visual} visual tokens at layer {layers[0]}, and its grid "
                f"of every {floor.stride} rows and columns takes {held}: raise the budget or the stride"
            )
        keep, of_kept = (count - held if union else share, _SECOND), (False, True)
    return request.schedule(
        layers,
        keep,
        score="last_token_unrotated" if own else "previous_layer_unrotated",
        floor=(floor, *[None] * (len(layers) - 1)),
        union=(union, *[False] * (len(layers) - 1)),
        of_kept=of_kept,
    )


def v2drop(request: PlanRequest) -> Schedule:
    """What the last layer changed most stays (13.4). V2Drop: three decisions, half of the tokens at the second, one
    token at the third (17)."""
    switches, depth = request.switches, request.num_layers
    switches.check_action(request.method, request.action)
    first = max(1, scaled_layer(3, depth))
    second = max(first + 1, scaled_layer(17, depth))
    layers = switches.layers or (first, second, max(second + 1, scaled_layer(22, depth)))
    if switches.keep:
        return request.schedule(layers, switches.keep, score="hidden_change")
    span = _spans(layers, 3, depth)
    share = _share(request, layers[0], span[0] + Fraction(span[1], 2), Fraction(span[2], request.visual))
    keep = (share, Fraction(1, 2), 1)
    return request.schedule(layers, keep, of_kept=(False, True, False), score="hidden_change")


def ivc(request: PlanRequest) -> Schedule:
    """Values like those of the text, and rotary anchors; the caches of earlier layers are cut to what is left (13.3,
    14.2, 15.1). IVC-Prune: one decision; with reroute a second one, where the layer's own values are compared (18.3).
    """
    switches, depth = request.switches, request.num_layers
    switches.check_action(request.method, request.action)
    half = max(1, depth // 2)
    first = half if switches.budget_of == "kv" else _late_start(request, half)
    layers = switches.layers or ((first,) if request.action == "delete" else _two(first, depth))
    if switches.keep:
        keep = switches.keep
    elif switches.budget_of == "kv":
        keep = (request.budget,) * len(layers)
    else:
        keep = (_share(request, layers[0], Fraction(depth - layers[0])),) * len(layers)
    floor, score = RotaryAnchors(), "value_similarity"
    if switches.ivc_llava_release:
        floor, score = RotaryAnchors(Fraction(1, 20), Fraction(1, 100), of_kept=False), "value_similarity_all_rows"
        keep = switches.keep or tuple(_beside(floor, share, request) for share in keep)
    cut = switches.cut_caches or ("all_but_first" if switches.ivc_llava_release else "all")
    return request.schedule(
        layers,
        keep,
        score=(score, *["value_similarity_own"] * (len(layers) - 1)) if request.action != "delete" else score,
        floor=floor,
        union=switches.ivc_llava_release,
        cut_caches=cut,
    )


def swiftvlm(request: PlanRequest) -> Schedule:
    """Attention of the last token on all tokens at every decision; proxies run for those that wait, and repair them
    (15.2). SwiftVLM (arXiv 2602.03134): three decisions, here with equal counts (17)."""
    switches, depth = replace(request.switches, repair=request.switches.repair or "proxy_offset"), request.num_layers
    if request.action == "delete":
        raise RerouteError("method 'swiftvlm' lets tokens return, it has no action='delete'")
    first = max(1, scaled_layer(3, depth))
    second = max(first + 1, scaled_layer(11, depth))
    layers = switches.layers or (first, second, max(second + 1, scaled_layer(15, depth)))
    keep = switches.keep and switches.keep * (len(layers) if len(switches.keep) == 1 else 1)
    if not keep:
        _spans(layers, len(layers), depth)
        waiting = ProxyOffset().proxies(request.visual, request.visual) if switches.repair == "proxy_offset" else 0
        proxies = Fraction(waiting * (layers[-1] - layers[0]), request.visual)
        keep = (_share(request, layers[0], Fraction(depth - layers[0]), proxies),) * len(layers)
    return replace(request, action="reroute", switches=switches).schedule(layers, keep)


def _two(first: int, depth: int) -> tuple[int, int]:
    second = max(first + 1, scaled_layer(23, depth))
    if second >= depth:
        raise RerouteError(
            f"method 'ivc' with action='reroute' needs two decisions, a decoder of {depth} layers has one"
        )
    return first, second


def _beside(floor: RotaryAnchors, share: Fraction, request: PlanRequest) -> Fraction:
    """What the scores may choose where a floor comes on top (14.3)."""
    left = share - 2 * floor.share - floor.seeds_share
    if left * request.visual < 1:
        raise RerouteError(
            f"ivc_llava_release keeps anchors and seeds on top of what it chooses, together 11 % of the visual tokens, "
            f"and the budget has {float(share):.4g} of them at the decision: raise it, or use budget_of='kv'"
        )
    return left


def _late_start(request: PlanRequest, latest: int) -> int:
    """The first decision, so early that layers with all tokens take at most three quarters of the budget (17)."""
    return min(latest, max(1, int(request.budget * request.num_layers * 3 / 4)))


def _spans(layers: Sequence[int], decisions: int, depth: int) -> list[int]:
    """Layers of each stage behind a decision. Raises RerouteError unless there are so many decisions in the decoder."""
    edges = [*layers, depth]
    spans = [hi - lo for lo, hi in pairwise(edges)]
    if len(layers) != decisions or min(spans) < 1 or layers[0] < 1:
        raise RerouteError(
            f"decisions at layers {', '.join(map(str, layers))} of {depth}, expected {decisions} ascending layers from "
            "1 on; for others give `keep` too"
        )
    return spans


def _share(request: PlanRequest, first: int, weight: Fraction, tail: Fraction = Fraction(0)) -> Fraction:
    """The share of the visual tokens that the first decision keeps, where later layers run `weight` times as many
    tokens as it keeps, and `tail` (as a share) on top."""
    if first >= request.num_layers:
        raise RerouteError(
            f"method {request.method!r} decides at layer {first} first, of a decoder with {request.num_layers}"
        )
    share = (request.budget * request.num_layers - first - tail) / weight
    wanted = f"method {request.method!r}: an average of {float(request.average):.4g} of {request.visual} visual tokens"
    if share * request.visual < 1:
        raise RerouteError(
            f"{wanted} leaves fewer than one token at its decision at layer {first} of {request.num_layers}, before "
            "which all tokens run: raise the budget"
        )
    if share > 1:
        raise RerouteError(f"{wanted} is more than its decisions from layer {first} on can spend: lower the budget")
    return share
