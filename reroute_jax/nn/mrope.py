"""Three-channel rotary positions (M-RoPE) of a prompt with still images, as Qwen2.5-VL defines them. Host code."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from reroute_jax.errors import RerouteError

COMPATS = ("hf-5.4",)


def mrope_positions(
    ids: Int[np.ndarray, " S"],
    image_token: int,
    grids: Sequence[tuple[int, int]],
    compat: str | None = None,
    temporal_rate: int | None = None,
) -> tuple[Int[np.ndarray, "3 S"], int]:
    """Temporal, vertical and horizontal position of each token of one unpadded prompt, and the next token's.

    Text advances all three channels together. An image starts at the position p that text would have there: its token
    in row r and column c gets (p, p + r, p + c), and what follows starts at p + max(rows, cols) (arXiv 2409.12191,
    section 2.1). `grids` are (rows, cols) in merged tokens, of the images in order of appearance; nothing needs to
    stand between two images. The next token's position, the same in all channels, is one more than the largest.

    compat="hf-5.4" gives what transformers 5.3.0 to 5.5.3 computed: their get_rope_index scaled still images as videos,
    so an image's temporal position is p * `temporal_rate` (the config's tokens_per_second), although height, width and
    the text behind stay right (huggingface/transformers issue 45325, fixed by pull request 45330). Where that exceeds
    every other position, the next token starts behind it, because their rope delta came from the largest too.

    Raises RerouteError where ids and grids do not match, and for an unknown `compat` or one without `temporal_rate`.
    """
    scale = _temporal_scale(compat, temporal_rate)
    starts = _image_starts(ids == image_token, grids)
    positions = np.empty((3, len(ids)), np.int32)
    token = position = 0
    for start, (rows, cols) in zip(starts, grids, strict=True):
        end, corner = start + rows * cols, position + start - token
        positions[:, token:start] = np.arange(position, corner)
        positions[0, start:end] = corner * scale
        positions[1:, start:end] = corner + np.indices((rows, cols)).reshape(2, -1)
        token, position = end, corner + max(rows, cols)
    positions[:, token:] = position + np.arange(len(ids) - token)
    return positions, int(positions.max(initial=-1)) + 1


def _temporal_scale(compat: str | None, temporal_rate: int | None) -> int:
    if compat is None:
        return 1
    if compat not in COMPATS:
        raise RerouteError(f"mrope_compat is {compat!r}, expected None or one of: {', '.join(COMPATS)}")
    if temporal_rate is None:
        raise RerouteError(f"mrope_compat {compat!r} needs tokens_per_second, and the model's config.json has none")
    return temporal_rate


def _image_starts(is_image: Bool[np.ndarray, " S"], grids: Sequence[tuple[int, int]]) -> list[int]:
    """Index of each image's first token, after checking that every image has its tokens on end."""
    places, starts, used = np.flatnonzero(is_image), [], 0
    for number, (rows, cols) in enumerate(grids, 1):
        own = places[used : used + rows * cols]
        if not len(own):
            raise RerouteError(f"there are {len(grids)} images and the prompt has image tokens for {number - 1} only")
        unbroken = int(np.argmin(is_image[own[0] : own[0] + rows * cols])) or len(own)
        if unbroken < rows * cols:
            raise RerouteError(
                f"image {number} has a grid of {rows} x {cols} = {rows * cols} visual tokens, but only {unbroken} "
                "image tokens stand together at its place in the prompt: expand one token for each"
            )
        starts.append(int(own[0]))
        used += rows * cols
    if used < len(places):
        raise RerouteError(
            f"the prompt has {len(places)} image tokens and the grids of its images ({len(grids)}) need {used}: "
            "the grids do not match, or an image is missing"
        )
    return starts
