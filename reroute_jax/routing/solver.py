"""Where a method decides, and the keep ratios that meet a token budget (7.1, 7.2). Host code, exact where possible."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

from reroute_jax.errors import RerouteError

Ratio = float | Fraction

# Boundaries of the released LLaVA-1.5 schedules, a decoder of 32 layers: the first one by shape, then the shared ones.
_DEPTH = 32
_FIRST = {"flat": 3, "pyramid": 2, "geometric": 2}
_LATER = (7, 15, 23)
_PYRAMID = (Fraction(1), Fraction(1), Fraction(1, 2), Fraction(1, 4))

# The released ratios by tier (7.3). Those of the 64 tier but flat do not average 64 tokens (7.1); no rule makes them.
OFFICIAL_RATIOS: dict[str, dict[int, tuple[float, ...]]] = {
    "flat": {192: (0.2644,) * 4, 128: (0.1418,) * 4, 64: (0.01916,) * 4},
    "pyramid": {
        192: (0.4502, 0.4502, 0.2251, 0.1126),
        128: (0.2655, 0.2655, 0.1328, 0.0664),
        64: (0.1392, 0.1392, 0.0696, 0.0348),
    },
    "geometric": {
        192: (0.5965, 0.3558, 0.2123, 0.1266),
        128: (0.4570, 0.2088, 0.0954, 0.0436),
        64: (0.2789, 0.0937, 0.0315, 0.0106),
    },
}

# A pooled grid may be at most this much wider or taller in proportion than the grid it pools.
_MAX_DISTORTION = Fraction(3, 2)


def scaled_layer(reference: int, num_layers: int) -> int:
    """The layer of a `num_layers` decoder that stands for layer `reference` of 32."""
    return reference * num_layers // _DEPTH


def decision_layers(shape: str, num_layers: int, first: int | None = None) -> tuple[int, ...]:
    """Decision layers of "flat", "pyramid" or "geometric" for any depth (7.2), ascending, the released ones at 32.

    first: the first of them, where not the shape's own. Raises RerouteError for a decoder too shallow to decide after
    its first layer, or to have `first`.
    """
    if first is None:
        first = _FIRST[shape]
        if num_layers < 16:
            first = max(1, round(first * num_layers / _DEPTH))
    elif not 0 <= first < num_layers:
        raise RerouteError(f"the first decision is at layer {first}, expected one of 0..{num_layers - 1}")
    layers = [first]
    for reference in _LATER:
        layers.append(max(layers[-1] + 1, scaled_layer(reference, num_layers)))
    layers = tuple(layer for layer in layers if layer < num_layers)
    if not layers:
        raise RerouteError(f"a decoder of {num_layers} layers leaves no layer to decide at, expected at least 2 layers")
    return layers


def solve(shape: str, layers: Sequence[int], num_layers: int, visual: int, average: Fraction) -> tuple[Ratio, ...]:
    """Keep ratios of `visual` tokens at `layers` so that `average` visual tokens run per decoder layer (7.1).

    "flat": equal ratios; "pyramid": proportional to 1, 1, 1/2, 1/4 (at most four decisions); both are exact fractions.
    "geometric": powers of one number in (0, 1), floats. Raises RerouteError, naming the limit, for a budget out of
    reach, and for one that leaves fewer than one token at the first decision.
    """
    lengths = [hi - lo for lo, hi in pairwise([*layers, num_layers])]
    excess = Fraction(average) * num_layers / visual - layers[0]
    wanted = f"an average of {float(average):.4g} of {visual} visual tokens per layer"
    if excess <= 0:
        minimum = Fraction(visual * layers[0], num_layers)
        raise RerouteError(
            f"{wanted} is not feasible: all tokens run in the layers before the first decision at layer {layers[0]} of "
            f"{num_layers}, so it must be more than {float(minimum):.1f} ({layers[0] / num_layers:.4f} of the tokens)"
        )
    if shape == "geometric":
        ratios = _geometric(lengths, float(excess))
    else:
        weights = _PYRAMID[: len(lengths)] if shape == "pyramid" else (Fraction(1),) * len(lengths)
        unit = sum(length * weight for length, weight in zip(lengths, weights, strict=True))
        ratios = tuple(excess / unit * weight for weight in weights)
        if ratios[0] > 1:
            maximum = float((layers[0] + unit) * visual / num_layers)
            raise RerouteError(
                f"{wanted} is not feasible: the {shape} shape reaches at most {maximum:.1f}, ask for less"
            )
    if visual * ratios[0] < 1:
        raise RerouteError(
            f"{wanted} leaves fewer than one token ({float(visual * ratios[0]):.2f}) at the decision at layer "
            f"{layers[0]}, raise the budget"
        )
    return ratios


def _geometric(lengths: Sequence[int], excess: float) -> tuple[float, ...]:
    """Powers r, r^2, ... with sum(length_s * r^(s+1)) = excess; the sum grows with r, so bisection finds the root."""
    if excess >= sum(lengths):
        raise RerouteError("the geometric shape needs a budget below all visual tokens, ask for less")
    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        if sum(length * middle ** (s + 1) for s, length in enumerate(lengths)) < excess:
            low = middle
        else:
            high = middle
    return tuple(high ** (s + 1) for s in range(len(lengths)))


def pool_grid(grid: tuple[int, int], tokens: int) -> tuple[int, int]:
    """The (rows, cols) with most cells, at most `tokens` and nearest the grid's own proportions where cells are equal.

    A cell grid distorts the proportions by at most 1.5. Raises RerouteError if none does.
    """
    rows, cols = grid

    def distortion(r: int, c: int) -> Fraction:
        stretch = Fraction(r * cols, c * rows)
        return max(stretch, 1 / stretch)

    fitting = [
        (r * c, -distortion(r, c), c, r)
        for r in range(1, rows + 1)
        for c in range(1, min(cols, tokens // r) + 1)
        if distortion(r, c) <= _MAX_DISTORTION
    ]
    if not fitting:
        raise RerouteError(
            f"no pooled grid of at most {tokens} cells resembles a {rows} x {cols} grid, raise the budget"
        )
    _, _, best_cols, best_rows = max(fitting)
    return best_rows, best_cols
