"""From a user's item to a `Question`: images opened and in the model's size, the prompt tokenised. Host work alone."""

from __future__ import annotations

from typing import Any

from reroute_jax.engine.batching import Question
from reroute_jax.engine.chat import Turn, split_messages
from reroute_jax.engine.given import check_ids
from reroute_jax.engine.images import open_image
from reroute_jax.engine.side_files import SideFiles
from reroute_jax.errors import RerouteError


def question_of(item: Any, files: SideFiles, *, text_special_tokens: bool = True) -> Question:
    """An (image, question) pair or a chat, ready to be asked; a `Question` is one already.

    Raises RerouteError for anything else, for an image that cannot be read, and for text whose placeholders are not the
    images'.
    """
    if isinstance(item, Question):
        return item
    turns, images = split_messages(item) if isinstance(item, list) else _one_turn(item)
    opened = [open_image(image) for image in images]
    grids = tuple(files.visual_grid(image) for image in opened)
    ids = files.chat_layout.prompt_ids(turns, grids, text_special_tokens=text_special_tokens)
    check_ids(ids, files.config, "the prompt")
    return Question(ids, grids, tuple(files.family.fit(image, files.image_processor) for image in opened))


def _one_turn(item: Any) -> tuple[list[Turn], list[Any]]:
    """An (image, question) pair as a turn of the user's, its images first."""
    if not isinstance(item, tuple) or len(item) != 2 or not isinstance(item[1], str):
        raise RerouteError("an item is no (image, question) pair: give one, or a chat as a list of (role, content)")
    image, text = item
    images = [] if image is None else list(image) if isinstance(image, list | tuple) else [image]
    return [Turn("user", (*[None] * len(images), text))], images
