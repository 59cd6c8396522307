"""What a routing method may be asked to do differently. Each switch is declared here and nowhere else: the command
line's arguments, the checks of `plan` and the table of the documentation are made from its declaration."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from fractions import Fraction
from numbers import Real
from typing import Any

from reroute_jax.errors import RerouteError, one_of
from reroute_jax.routing.budget import exact_number
from reroute_jax.routing.hiprune import NEIGHBOURS
from reroute_jax.routing.nuwa import SIM_ORDERS
from reroute_jax.routing.plan import DEEPSTACK, POSITION_MODES
from reroute_jax.routing.records import check_types
from reroute_jax.routing.repair import REPAIRS
from reroute_jax.routing.visionzip import CLASS_TOKENS

# Of the switches, those that take a budget's place.
AMOUNTS = ("keep_ratio", "keep")

_STAGED = ("fastv", "pdrop", "random", "uniform", "layout")
_INSIDE = ("feather", "v2drop", "ivc", "swiftvlm")
_ROUTED = ("fastv", "pdrop", "nuwa", "random", "uniform", "layout", *_INSIDE)
_RETURNING = ("fastv", "pdrop", "nuwa", "random", "uniform", *_INSIDE)
_BEFORE = ("divprune", "hiprune", "visionzip", "downsample")
_EVERY = ("fastv", "pdrop", "nuwa", "random", "uniform", "layout")
_POSITIONED = ("fastv", "pdrop", "nuwa", "random", "uniform", "pool", "layout", *_BEFORE)


@dataclass(frozen=True)
class Switch:
    """methods: that know it. kind, choices: type of its values, and all of them where they are few. action, family: the
    only ones that it means something to, None for any. defect: whether it reproduces a defect of a release."""

    default: Any
    about: str
    methods: tuple[str, ...]
    kind: Callable[[str], Any] = str
    choices: tuple[str, ...] = ()
    action: str | None = None
    family: str | None = None
    defect: bool = False


def numbers(text: str) -> tuple[int | Fraction, ...]:
    """ "3,8" or "2/9,0.1". Raises ValueError for anything else."""
    return tuple(exact_number(part) for part in text.split(","))


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def shown(value: Any) -> Any:
    """As it is typed."""
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else value


def _switch(default: Any, about: str, methods: tuple[str, ...], **more) -> Any:
    return field(default=default, metadata={"switch": Switch(default, about, methods, **more)})


@dataclass(frozen=True)
class Switches:
    """The switches of one call of `plan`. Raises RerouteError for a value that is not allowed."""

    decisions: str | None = _switch(
        None,
        "'every' or 'every:K': decide at every layer, or every K-th, from the method's first one on, with one solved "
        "ratio",
        _EVERY,
    )
    first_decision: int | None = _switch(
        None, "layer of the first decision (FastV's K), instead of the released 2 or 3", _STAGED, kind=int
    )
    ratios: str = _switch(
        "solved",
        "keep ratios solved for this depth and budget, or the released ones (192, 128 and 64 only)",
        _STAGED,
        choices=("solved", "official"),
    )
    score_source: str | None = _switch(
        None,
        "attention that ranks the tokens of a deletion (3.5), instead of the one released with the method",
        ("fastv", "pdrop", "nuwa", "feather"),
        choices=("own_layer", "previous_layer"),
        action="delete",
    )
    position_mode: str = _switch(
        "original",
        "keep token positions, or renumber after each decision and behind a reduction of section 16",
        _POSITIONED,
        choices=POSITION_MODES,
    )
    variant: str | None = _switch(
        None,
        "reroute at the layers of this shape (6), instead of Nuwa's own two",
        ("nuwa",),
        choices=("flat", "pyramid"),
        action="reroute",
    )
    nuwa_first_score: str = _switch(
        "own_layer",
        "attention at the first reroute decision: its own layer's, or what Nuwa itself ranks by",
        ("nuwa",),
        choices=("own_layer", "host"),
        action="reroute",
    )
    self_weight_override: bool = _switch(
        True, "overwrite the self weight of merged tokens, as released (4.3)", ("nuwa",), kind=bool, family="llava"
    )
    keep_ratio: float | None = _switch(
        None,
        "a released ratio, 0.25, 0.5 or 0.75 (5.1), instead of a budget",
        ("nuwa",),
        kind=float,
        family="qwen2_5_vl",
    )
    qwen_sim_order: str = _switch(
        "raster",
        "'window' leaves the rows of the similarity in window order, as the release does (5.2)",
        ("nuwa",),
        choices=SIM_ORDERS,
        family="qwen2_5_vl",
        defect=True,
    )
    qwen_layer14_causal: bool = _switch(
        True,
        "without it the layer before the decision has no causal mask, as in the release (5.4)",
        ("nuwa",),
        kind=bool,
        family="qwen2_5_vl",
        defect=True,
    )
    layers: tuple[int, ...] | None = _switch(
        None, "decision layers, instead of the method's own", _INSIDE, kind=numbers
    )
    keep: tuple[int | float | Fraction, ...] | None = _switch(
        None,
        "visual tokens to keep, a number or a share for each decision, instead of a budget",
        (*_INSIDE, *_BEFORE),
        kind=numbers,
    )
    repair: str | None = _switch(
        None,
        "of tokens that waited while a stage ran, before they return: SwiftVLM's proxies, the mean offset of what ran, "
        "or none (15.2)",
        _RETURNING,
        choices=("none", *filter(None, REPAIRS)),
        action="reroute",
    )
    stride: int = _switch(3, "FEATHER keeps every this many rows and columns (14.1)", ("feather",), kind=int)
    floor_count: str = _switch(
        "fill",
        "the grid counts among the tokens kept, or comes on top of them as released (14.3)",
        ("feather",),
        choices=("fill", "union"),
        family="llava",
        action="delete",
    )
    budget_of: str = _switch(
        "compute",
        "what the budget averages: tokens that run, or tokens cached, which IVC-Prune's own numbers mean (17)",
        ("ivc",),
        choices=("compute", "kv"),
    )
    cut_caches: str | None = _switch(
        None,
        "caches of the layers before the decision: cut to what it keeps, but for layer 0 as released for LLaVA, or "
        "left alone (15.1)",
        ("ivc",),
        choices=("all", "all_but_first", "no"),
    )
    ivc_llava_release: bool = _switch(
        False,
        "as released for LLaVA: similarity over all tokens, anchors and seeds as shares of the image and on top of the "
        "count, layer 0 not cut",
        ("ivc",),
        kind=bool,
        action="delete",
        family="llava",
        defect=True,
    )
    neighbours: str = _switch(
        "grid",
        "of an anchor: on the grid, or by index, which wraps around at the border, as released (16.3)",
        ("hiprune",),
        choices=NEIGHBOURS,
        defect=True,
    )
    cls: str = _switch(
        "drop",
        "'keep' the class token in the place of a patch and put contextual tokens last, as released; with "
        "position_mode='renumber' (16.2)",
        ("visionzip",),
        choices=CLASS_TOKENS,
        family="llava",
    )
    blur: bool = _switch(
        False,
        "resize the smaller image back, with all its tokens: what the lost resolution costs (16.4)",
        ("downsample",),
        kind=bool,
    )
    deepstack: str = _switch(
        "all",
        "which visual tokens get the image features that its first layers add: also deferred ones, only those that ran "
        "the layer, or every one because the first decision comes later (3.6)",
        (*_STAGED, *_INSIDE),
        choices=DEEPSTACK,
        family="qwen3_vl",
    )
    seed: int = _switch(0, "of the random scores", ("random",), kind=int)
    first_image_only: bool = _switch(False, "of several images in a row, route the first one only", _ROUTED, kind=bool)

    def __post_init__(self) -> None:
        check_types(Switches, vars(self))
        for name, switch in SWITCHES.items():
            value = getattr(self, name)
            if switch.choices and value is not None:
                one_of(name, value, switch.choices)
        if self.decisions is not None and not re.fullmatch(r"every(:[1-9]\d*)?", self.decisions):
            raise RerouteError(f"decisions is {self.decisions!r}, expected 'every' or 'every:K' with K from 1 on")
        if not all(_is_real(layer) and layer == int(layer) >= 0 for layer in self.layers or ()):
            raise RerouteError(f"layers are {shown(self.layers)}, expected whole numbers from 0 on")
        if not all(map(_is_real, self.keep or ())):
            raise RerouteError(f"keep is {shown(self.keep)}, expected numbers of visual tokens or shares of them")
        if self.ratios == "official" and (self.decisions is not None or self.first_decision is not None):
            raise RerouteError("ratios='official' belongs to a method's own decisions, use ratios='solved' here")

    @property
    def amount(self) -> str | None:
        """The switch that says how much stays, so that a budget cannot."""
        return next((name for name in AMOUNTS if getattr(self, name) is not None), None)

    @property
    def step(self) -> int:
        """Layers between two decisions of `decisions`."""
        return int(self.decisions.partition(":")[2] or 1)

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the switches that do not stand at their default."""
        return tuple(name for name, switch in SWITCHES.items() if getattr(self, name) != switch.default)

    def check(self, method: str, family: str) -> None:
        """Raises RerouteError naming a changed switch that the method, or the model's family, has no use for."""
        for name in self.changed:
            switch, value = SWITCHES[name], getattr(self, name)
            if method not in switch.methods:
                users = ", ".join(map(repr, switch.methods))
                raise RerouteError(f"method {method!r} has no use for {name}={value!r}, it is for {users}")
            if switch.family not in (None, family):
                raise RerouteError(f"{name} of method {method!r} is for {switch.family}, this model is {family}")

    def check_action(self, method: str, action: str) -> None:
        """Raises RerouteError naming a changed switch that belongs to the other action."""
        for name in self.changed:
            if SWITCHES[name].action not in (None, action):
                raise RerouteError(
                    f"{name} of method {method!r} belongs to action={SWITCHES[name].action!r}, leave it out here"
                )


SWITCHES: dict[str, Switch] = {one.name: one.metadata["switch"] for one in fields(Switches)}
