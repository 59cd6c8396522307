"""How many tokens of an image stay before the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from reroute_jax.errors import RerouteError
from reroute_jax.routing.tower import Tower
from reroute_jax.types import Grid


@dataclass(frozen=True)
class Kept:
    """A share of an image's tokens, to the nearest whole number, halves to even and at least one, or a number."""

    share: Fraction | None = None
    count: int | None = None

    def __post_init__(self) -> None:
        if (self.share is None) == (self.count is None):
            raise RerouteError(f"{type(self).__name__} keeps either a share or a count, give one of them")
        if self.share is not None and not 0 < self.share <= 1:
            raise RerouteError(f"{type(self).__name__} keeps a share of {self.share}, expected a fraction in (0, 1]")
        if self.count is not None and self.count < 1:
            raise RerouteError(f"{type(self).__name__} keeps {self.count} tokens, expected at least 1")

    def anchors(self, visual: int, grid: Grid) -> int:
        """The tokens left of `visual` on a (rows, cols) grid."""
        check_grid(visual, grid)
        return self.cap(visual)

    def cap(self, visual: int) -> int:
        """The most that can be left of up to `visual` tokens."""
        return min(visual, self.count) if self.count is not None else max(1, round(self.share * visual))

    def members(self, tower: Tower, arrays: dict[str, Array]) -> Bool[Array, "I C n"]:
        """A kept token stands for itself."""
        return of_slots(self.reduce(tower, arrays)[1], tower.features().shape[1])


def of_slots(index: Int[Array, "I C"], tokens: int) -> Bool[Array, "I C n"]:
    """The token of each slot alone, of `tokens`; none in slots behind them."""
    return index[..., None] == jnp.arange(tokens)


def check_grid(visual: int, grid: Grid) -> None:
    if grid[0] * grid[1] != visual or visual < 1:
        raise RerouteError(
            f"a grid of {grid[0]} x {grid[1]} does not hold {visual} visual tokens, expected their rows x cols"
        )
