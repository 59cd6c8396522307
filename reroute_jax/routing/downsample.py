"""A smaller image instead of fewer tokens of a large one: the control `downsample` (16.4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from PIL import Image

from reroute_jax.nn.layers import take_rows
from reroute_jax.routing.kept import Kept, check_grid
from reroute_jax.routing.pool import pool_weights
from reroute_jax.routing.tower import Tower, TowerSizes
from reroute_jax.types import Grid


@dataclass(frozen=True)
class Downsample(Kept):
    """The image that the model sees, resized before the tower to at most as many tokens as are asked for.

    square: to as many rows as columns, for a family whose images have one square grid. blur: and resized back, so that
    all tokens stay: what the lost resolution costs by itself.
    """

    square: bool = False
    blur: bool = False

    def cap(self, visual: int) -> int:
        """As of `Kept`, but cut to whole tokens: a share is an upper bound here."""
        if self.blur:
            return visual
        return min(visual, self.count) if self.count is not None else max(1, int(self.share * visual))

    def anchors(self, visual: int, grid: Grid) -> int:
        check_grid(visual, grid)
        return math.prod(self.cells(grid))

    def cells(self, grid: Grid) -> Grid:
        """(rows, cols) of the tokens that are left."""
        return grid if self.blur else self.smaller(grid)

    def smaller(self, grid: Grid) -> Grid:
        """(rows, cols) of the smaller image."""
        tokens = Downsample(self.share, self.count).cap(grid[0] * grid[1])
        return smaller_grid(grid, tokens, self.square)

    def resized(self, image: Float[np.ndarray, "height width 3"], grid: Grid) -> Float[np.ndarray, "_ _ 3"]:
        """The smaller image of one of (rows, cols) tokens."""
        rows, cols = self.smaller(grid)
        small = bicubic(image, image.shape[0] // grid[0] * rows, image.shape[1] // grid[1] * cols)
        return bicubic(small, *image.shape[:2]) if self.blur else small

    def shrinking(self, grid: Grid) -> tuple[Fraction, Fraction]:
        """(width, height) of what the tower sees, as shares of the image's."""
        rows, cols = self.cells(grid)
        return Fraction(cols, grid[1]), Fraction(rows, grid[0])

    def arrays(self, grid: Grid, tokens: int) -> dict[str, np.ndarray]:
        cap, size = self.cap(tokens), grid[0] * grid[1]
        centre, covered = np.zeros(cap, np.int32), np.zeros((cap, tokens), bool)
        weights, centres = pool_weights(grid, self.cells(grid))
        centre[: len(centres)], covered[: len(centres), :size] = centres, weights > 0
        return {"centre": centre, "covered": covered}

    def reduce(self, tower: Tower, arrays: dict[str, Array]) -> tuple[Float[Array, "I C E"], Int[Array, "I C"]]:
        """The tower has seen the smaller images; a token stands for the middle of what it covers."""
        features, centre = tower.project(tower.features()), arrays["centre"]
        slots = jnp.broadcast_to(jnp.arange(centre.shape[1]), centre.shape)
        return take_rows(features, slots), centre

    def macs(self, sizes: TowerSizes, grid: Grid) -> int:
        """None: the tower itself costs less (20)."""
        return 0

    def members(self, tower: Tower, arrays: dict[str, Array]) -> Bool[Array, "I C n"]:
        """The tokens of the large image in the area of one of the smaller image."""
        return jnp.asarray(arrays["covered"])


def smaller_grid(grid: Grid, tokens: int, square: bool) -> Grid:
    """The (rows, cols) with most cells, at most `tokens` and none of its sides longer than the grid's; of equally many
    those nearest the grid's proportions, then those with more rows."""
    rows, cols = grid
    if square:
        side = min(math.isqrt(tokens), *grid)
        return side, side

    def preferred(cells: Grid) -> tuple[int, Fraction, int]:
        stretch = Fraction(cells[0] * cols, cells[1] * rows)
        return math.prod(cells), -max(stretch, 1 / stretch), cells[0]

    return max(((r, min(cols, tokens // r)) for r in range(1, min(rows, tokens) + 1)), key=preferred)


def bicubic(image: Float[np.ndarray, "height width 3"], height: int, width: int) -> Float[np.ndarray, "_ _ 3"]:
    """Pillow's filter on fp32 numbers."""
    channels = [Image.fromarray(channel) for channel in np.ascontiguousarray(np.moveaxis(image, 2, 0))]
    resized = [channel.resize((width, height), Image.Resampling.BICUBIC) for channel in channels]
    return np.stack([np.asarray(channel) for channel in resized], axis=2)
