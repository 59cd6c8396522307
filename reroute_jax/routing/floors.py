"""Visual tokens that a decision must keep (14): a small frozen class for each kind, made on the host from positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, Int

from reroute_jax.config import DecoderConfig
from reroute_jax.errors import RerouteError
from reroute_jax.types import Grid


@dataclass(frozen=True)
class StrideGrid:
    """Rows and columns 0, stride, 2 * stride, ... of every image's grid (14.1)."""

    stride: int = 3

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise RerouteError(f"the stride of a grid is {self.stride}, expected 1 or more")

    @property
    def fixed(self) -> bool:
        """Whether positions alone decide, and no scores."""
        return True

    def most(self, visual: int, keep: int) -> int:
        """At most so many of a row's `visual` tokens: a single row of them has the most, ceil(visual / stride)."""
        return -(-visual // self.stride)

    def seeds(self, visual: int, keep: int) -> int:
        return 0

    def mask(
        self, grids: Sequence[Grid], positions: Int[np.ndarray, "C n"], keep: int, config: DecoderConfig
    ) -> Bool[np.ndarray, " n"]:
        """Of a row's original visual tokens."""
        return np.concatenate([stride_grid(grid, self.stride).ravel() for grid in grids])


@dataclass(frozen=True)
class RotaryAnchors:
    """Of every image the tokens whose mean cosine over the rotary pairs is largest, and those whose mean sine is
    (14.2), with the seeds of a score in two passes (13.3).

    share: of an image's tokens by either. seeds: of the row's. of_kept: both are shares of what the decision keeps, and
    not of the tokens at the decoder input (17).
    """

    share: Fraction = Fraction(1, 5)
    seeds_share: Fraction = Fraction(1, 50)
    of_kept: bool = True

    def __post_init__(self) -> None:
        for name in ("share", "seeds_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise RerouteError(f"{name} of rotary anchors is {getattr(self, name)}, expected a value in [0, 1]")

    @property
    def fixed(self) -> bool:
        return not self.seeds_share

    def most(self, visual: int, keep: int) -> int:
        return 2 * round(self.share * self._base(visual, keep)) + self.seeds(visual, keep)

    def seeds(self, visual: int, keep: int) -> int:
        """Seeds of a row with `visual` tokens, at least one; halves to even."""
        return max(1, round(self.seeds_share * self._base(visual, keep))) if self.seeds_share and visual else 0

    def mask(
        self, grids: Sequence[Grid], positions: Int[np.ndarray, "C n"], keep: int, config: DecoderConfig
    ) -> Bool[np.ndarray, " n"]:
        """Of a row's original visual tokens, the seeds aside. positions: one channel, or three with M-RoPE."""
        means, parts, start = rotary_means(positions, config.rope_theta, config.head_dim), [], 0
        for rows, cols in grids:
            image = slice(start, start := start + rows * cols)
            count = round(self.share * self._base(rows * cols, Fraction(keep * rows * cols, positions.shape[1])))
            chosen = np.zeros(rows * cols, bool)
            for values in means:
                chosen[np.argsort(-values[image], kind="stable")[:count]] = True
            parts.append(chosen)
        return np.concatenate(parts)

    def _base(self, visual: int, keep: int | Fraction) -> int | Fraction:
        return keep if self.of_kept else visual


Floor = StrideGrid | RotaryAnchors
FLOORS = {floor.__name__: floor for floor in (StrideGrid, RotaryAnchors)}


def stride_grid(grid: Grid, stride: int) -> Bool[np.ndarray, "rows cols"]:
    inside = np.zeros(grid, bool)
    inside[::stride, ::stride] = True
    return inside


def rotary_means(
    positions: Int[np.ndarray, "C n"], theta: float, dim: int
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Mean cosine and mean sine of each token over a head's rotary pairs, fp32, summed over the channels (14.2).

    With M-RoPE each channel counts with all pairs, not with its own section. The means of a position are made in
    float64 and cast, and rows and columns are added before time: transposed tokens then tie exactly.
    """
    cosine, sine = (table[positions] for table in _tables(theta, dim, int(positions.max(initial=0))))
    if len(positions) == 1:
        return cosine[0], sine[0]
    return tuple(time + (row + col) for time, row, col in (cosine, sine))


@lru_cache(maxsize=16)
def _tables(theta: float, dim: int, last: int) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, " P"]]:
    """By position from 0 to `last`."""
    angles = np.arange(last + 1)[:, None] * theta ** (-np.arange(0, dim, 2) / dim)
    return np.cos(angles).mean(axis=1).astype(np.float32), np.sin(angles).mean(axis=1).astype(np.float32)
