"""What a smaller image changes of a prompt: the pixels for the encoder, and positions of three channels (16.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from reroute_jax.config import ModelConfig
from reroute_jax.models import FAMILIES
from reroute_jax.routing.downsample import Downsample
from reroute_jax.routing.merge import Merge
from reroute_jax.routing.pool import cell_centres
from reroute_jax.types import Grid


def packed(merge: Merge | None, pixels: np.ndarray, grids: Sequence[Grid], config: ModelConfig, images: int) -> Any:
    """Pixels for `Family.encode_images`, padded to `images` images, resized first where the merge resizes."""
    family = FAMILIES[config.family]
    if isinstance(merge, Downsample):
        seen = family.unpack(pixels, grids, config)
        smaller = [merge.resized(image, grid) for image, grid in zip(seen, grids, strict=True)]
        grids = [merge.cells(grid) for grid in grids]
        pixels = family.repack(smaller, grids, config)
    return family.pack(pixels, grids, config, images)


def smaller_positions(
    merge: Downsample,
    ids: Int[np.ndarray, " S"],
    grids: Sequence[Grid],
    visual: Int[np.ndarray, "3 n"],
    config: ModelConfig,
) -> tuple[Int[np.ndarray, "3 S"], Int[np.ndarray, "3 n"], int]:
    """Positions of a prompt whose images have these grids, as of an ordinary prompt with the smaller images; those of
    the original visual tokens, where the tokens that cells stand for have their cell's; and the next token's.

    ids: with as many tokens of each image as the smaller one has. visual: positions of the original visual tokens.
    """
    cells = [merge.cells(grid) for grid in grids]
    positions, next_position = FAMILIES[config.family].positions(ids, cells, config)
    first = np.cumsum([0, *(rows * cols for rows, cols in grids)])[:-1]
    centres = [before + cell_centres(*both) for before, *both in zip(first, grids, cells, strict=True)]
    moved = visual.copy()
    moved[:, np.concatenate(centres)] = positions[:, ids == config.image_token]
    return positions, moved, next_position
