"""The 38 released configurations by their own names (7.3)."""

from __future__ import annotations

from reroute_jax.errors import RerouteError
from reroute_jax.models import FAMILIES
from reroute_jax.models.family import Family
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.solver import OFFICIAL_RATIOS, decision_layers

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
    """What the release calls a variant and tier (None and None: all tokens) of a family that it covers."""
    prefix = family.released.prefix
    return f"{prefix}_baseline" if variant is None else f"{prefix}_{variant}_avg{tier}"


# Name -> family, variant, tier.
PRESETS: dict[str, tuple[str, str | None, int | None]] = {
    preset_name(family, variant, tier): (family.name, variant, tier)
    for family in FAMILIES.values()
    if family.released is not None
    for variant, tier in [(None, None), *((variant, tier) for tier in _TIERS for variant in _VARIANTS)]
}


def preset(name: str, num_layers: int) -> Schedule:
    """Schedule of a released configuration, e.g. "llava15_ours_vs_pdrop_avg128", labelled with its name.

    Raises RerouteError for an unknown name, and for a decoder of another depth than the one it was released for.
    """
    if name not in PRESETS:
        raise RerouteError(f"unknown preset {name!r}, expected one of: {', '.join(PRESETS)}")
    family, variant, tier = PRESETS[name]
    depth = FAMILIES[family].released.depth
    if num_layers != depth:
        raise RerouteError(
            f"preset {name!r} is for {depth} decoder layers and the model has {num_layers}, use a method"
        )
    if variant is None:
        return Schedule.from_decisions((), (), depth, label=name)
    shape, action = _VARIANTS[variant]
    layers, ratios = decision_layers(shape, depth), OFFICIAL_RATIOS[shape][tier]
    if variant == "fastv_K3":
        layers, ratios = layers[:1], ratios[:1]
    return Schedule.from_decisions(layers, ratios, depth, action, label=name)
