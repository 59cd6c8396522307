"""From a user's item to a `Question`: images opened and in the model's size, the prompt tokenised. Host work alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
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
    pixels: as the family's `fit` gives them. folder: of the checkpoint whose image processor made it."""

    grid: Grid
    pixels: UInt8[np.ndarray, "height width 3"]
    folder: Path


def fitted_image(source: Any, files: SideFiles) -> FittedImage:
    """Of what `images.open_image` takes; one that is fitted already stays as it is.

    Raises RerouteError for an image that cannot be read, for a size that the model does not take, and for one that was
    fitted for another checkpoint.
    """
    if isinstance(source, FittedImage):
        _check_own(source.folder, files, "an image", "the image itself")
        return source
    opened = open_image(source)
    return FittedImage(files.visual_grid(opened), files.family.fit(opened, files.image_processor), files.folder)


def question_of(item: Any, files: SideFiles, *, text_special_tokens: bool = True) -> Question:
    """An (image, question) pair or a chat, ready to be asked; a `Question` is one already.

    Raises RerouteError for anything else, for an image that cannot be read, for text whose placeholders are not the
    images', and for what was made for another checkpoint.
    """
    if isinstance(item, Question):
        if item.folder is not None:
            _check_own(item.folder, files, "a question", "its image and text")
        return item
    turns, images = split_messages(item) if isinstance(item, list) else _one_turn(item)
    fitted = [fitted_image(image, files) for image in images]
    grids = tuple(image.grid for image in fitted)
    ids = files.chat_layout.prompt_ids(turns, grids, text_special_tokens=text_special_tokens)
    check_ids(ids, files.config, "the prompt")
    return Question(ids, grids, tuple(image.pixels for image in fitted), files.folder)


def _check_own(folder: Path, files: SideFiles, what: str, instead: str) -> None:
    if folder != files.folder and folder.resolve() != files.folder.resolve():
        raise RerouteError(f"{what} that was made for {folder}, asked of {files.folder}: give {instead}")


def _one_turn(item: Any) -> tuple[list[Turn], list[Any]]:
    """An (image, question) pair as a turn of the user's, its images first."""
    if not isinstance(item, tuple) or len(item) != 2 or not isinstance(item[1], str):
        raise RerouteError("an item is no (image, question) pair: give one, or a chat as a list of (role, content)")
    image, text = item
    images = [] if image is None else list(image) if isinstance(image, list | tuple) else [image]
    return [Turn("user", (*[None] * len(images), text))], images
