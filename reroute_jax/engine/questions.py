"""From a user's item to a `Question`: images opened and in the model's size, the prompt tokenised. Host work alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from reroute_jax.engine.batching import Question
from reroute_jax.engine.chat import Turn, split_messages
from reroute_jax.engine.given import check_ids
from reroute_jax.engine.images import open_image
from reroute_jax.engine.side_files import SideFiles
from reroute_jax.errors import RerouteError
from reroute_jax.types import Grid


@dataclass(frozen=True)
class FittedImage:
    """An image opened and in the model's size, for any number of questions. grid: (rows, columns) of its visual tokens.
    pixels: as the family's `fit` gives them."""

    grid: Grid
    pixels: UInt8[np.ndarray, "height width 3"]


def fitted_image(source: Any, files: SideFiles) -> FittedImage:
    """Of what `images.open_image` takes; one that is fitted already stays as it is.

    Raises RerouteError for an image that cannot be read, and for a size that the model does not take.
    """
    if isinstance(source, FittedImage):
        return source
    opened = open_image(source)
    return FittedImage(files.visual_grid(opened), files.family.fit(opened, files.image_processor))


def question_of(item: Any, files: SideFiles, *, text_special_tokens: bool = True) -> Question:
    """An (image, question) pair or a chat, ready to be asked; a `Question` is one already.

    Raises RerouteError for anything else, for an image that cannot be read, and for text whose placeholders are not the
    images'.
    """
    if isinstance(item, Question):
        return item
    turns, images = split_messages(item) if isinstance(item, list) else _one_turn(item)
    fitted = [fitted_image(image, files) for image in images]
    grids = tuple(image.grid for image in fitted)
    ids = files.chat_layout.prompt_ids(turns, grids, text_special_tokens=text_special_tokens)
    check_ids(ids, files.config, "the prompt")
    return Question(ids, grids, tuple(image.pixels for image in fitted))


def _one_turn(item: Any) -> tuple[list[Turn], list[Any]]:
    """An (image, question) pair as a turn of the user's, its images first."""
    if not isinstance(item, tuple) or len(item) != 2 or not isinstance(item[1], str):
        raise RerouteError("an item is no (image, question) pair: give one, or a chat as a list of (role, content)")
    image, text = item
    images = [] if image is None else list(image) if isinstance(image, list | tuple) else [image]
    return [Turn("user", (*[None] * len(images), text))], images
