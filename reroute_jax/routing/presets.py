"""Released configurations: the 38 of Reroute by their own names (7.3), and those of other methods (17). For a family
that Reroute was not released for, ours in their place, whose names say that they are scaled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

from reroute_jax.errors import RerouteError, one_of
from reroute_jax.models import FAMILIES
from reroute_jax.models.family import Family
from reroute_jax.routing.divprune import DivPrune
from reroute_jax.routing.floors import RotaryAnchors, StrideGrid
from reroute_jax.routing.hiprune import HiPrune
from reroute_jax.routing.merge import Merge
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.solver import OFFICIAL_RATIOS, decision_layers
from reroute_jax.routing.visionzip import VisionZip

_TIERS = (192, 128, 64)

# shape of the ratios, action. The two layouts of reroute are one computation (3.4), so here they are equal.
_VARIANTS = {
    "fastv_K3": ("flat", "delete"),
    "pdrop_earlyL2": ("geometric", "delete"),
    "ours_vs_fastv": ("flat", "reroute"),
    "ours_vs_fastv_stagewise": ("flat", "reroute"),
    "ours_vs_pdrop": ("pyramid", "reroute"),
    "ours_vs_pdrop_stagewise": ("pyramid", "reroute"),
}


def preset_name(family: Family, variant: str | None, tier: int | None) -> str:
    """What the release calls, or would call, a variant and tier (None and None: all tokens) of a family."""
    prefix = family.released.prefix
    return f"{prefix}_baseline" if variant is None else f"{prefix}_{variant}_avg{tier}"


# Name -> family, variant, tier.
PRESETS: dict[str, tuple[str, str | None, int | None]] = {
    preset_name(family, variant, tier): (family.name, variant, tier)
    for family in FAMILIES.values()
    if family.released is not None
    for variant, tier in [(None, None), *((variant, tier) for tier in _TIERS for variant in _VARIANTS)]
}


def _feather() -> Schedule:
    """30 % of the tokens on top of a grid of stride 3, then the square of 30 % of those (17)."""
    return Schedule.from_decisions(
        (8, 16),
        (Fraction(3, 10), Fraction(9, 100)),
        32,
        "delete",
        score="previous_layer_unrotated",
        floor=(StrideGrid(3), None),
        union=(True, False),
        of_kept=(False, True),
    )


def _v2drop() -> Schedule:
    return Schedule.from_decisions(
        (3, 17, 22),
        (Fraction(1, 2), Fraction(1, 2), 1),
        32,
        "delete",
        score="hidden_change",
        of_kept=(False, True, False),
    )


def _ivc_llava() -> Schedule:
    return Schedule.from_decisions(
        (16,),
        (Fraction(1, 5),),
        32,
        "delete",
        score="value_similarity_all_rows",
        floor=RotaryAnchors(Fraction(1, 20), Fraction(1, 100), of_kept=False),
        union=True,
        cut_caches="all_but_first",
    )


def _ivc_qwen() -> Schedule:
    return Schedule.from_decisions(
        (16,),
        (Fraction(1, 2),),
        28,
        "delete",
        score="value_similarity",
        floor=RotaryAnchors(Fraction(1, 10), Fraction(1, 100), of_kept=False),
        cut_caches="all",
    )


def _swiftvlm(count: int) -> Callable[[], Schedule]:
    """The released layers; the counts, which are not released, are those of the solver (17)."""
    how = {"action": "reroute", "repair": "proxy_offset"}
    return lambda: Schedule.from_decisions((3, 11, 15), (count,) * 3, 32, **how)


def _before(merge: Merge, depth: int, position_mode: str) -> Callable[[], Schedule]:
    return lambda: Schedule.from_decisions((), (), depth, position_mode=position_mode, merge=merge)


# Other methods as they were released (17), each for the depth of its model.
METHOD_PRESETS: dict[str, Callable[[], Schedule]] = {
    "feather_32": _feather,
    "v2drop_llava15": _v2drop,
    "ivc_llava15": _ivc_llava,
    "ivc_qwen25vl": _ivc_qwen,
    **{f"swiftvlm_llava15_{tier}": _swiftvlm(count) for tier, count in ((192, 144), (128, 74), (64, 3))},
    "divprune_llava15": _before(DivPrune(Fraction(98, 1000)), 32, "renumber"),
    **{f"hiprune_llava15_{tier}": _before(HiPrune(count=tier, neighbours="flat"), 32, "renumber") for tier in _TIERS},
    **{f"visionzip_llava15_{tier}": _before(VisionZip(count=tier, cls="keep"), 32, "renumber") for tier in _TIERS},
    **{
        f"hiprune_qwen25vl_{share}": _before(HiPrune(Fraction(share, 1000), neighbours="flat"), 28, "original")
        for share in (334, 223, 112)
    },
}


def preset(name: str, num_layers: int) -> Schedule:
    """Schedule of a released configuration, e.g. "llava15_ours_vs_pdrop_avg128", labelled with its name.

    Raises RerouteError for an unknown name, and for a decoder of another depth than the one it was released for.
    """
    if name in METHOD_PRESETS:
        made = replace(METHOD_PRESETS[name](), label=name)
        _check_depth(name, made.num_layers, num_layers)
        return made
    one_of("preset", name, (*PRESETS, *METHOD_PRESETS))
    family, variant, tier = PRESETS[name]
    depth = FAMILIES[family].released.depth or num_layers
    _check_depth(name, depth, num_layers)
    if variant is None:
        return Schedule.from_decisions((), (), depth, label=name)
    shape, action = _VARIANTS[variant]
    layers, ratios = decision_layers(shape, depth), OFFICIAL_RATIOS[shape][tier]
    if variant == "fastv_K3":
        layers, ratios = layers[:1], ratios[:1]
    return Schedule.from_decisions(layers, ratios, depth, action, label=name)


def _check_depth(name: str, depth: int, num_layers: int) -> None:
    if num_layers != depth:
        raise RerouteError(
            f"preset {name!r} is for {depth} decoder layers and the model has {num_layers}, use a method"
        )
