"""Chat prompts: messages laid out by the checkpoint's own chat template, tokenised, image placeholders expanded.

    turns, images = split_messages([("system", "Be brief."), ("user", [image, "What is this?"])])
    layout = open_layout(folder, tokenizer, config)
    ids = layout.prompt_ids(turns, grids, text_special_tokens=False)  # grids: (rows, columns) of each of `images`
    ids = layout.question_ids("What is this?", grids)  # one user turn, images first

The ids are those of transformers' `processor.apply_chat_template(..., tokenize=True, add_generation_prompt=True)`.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Int

from reroute_jax.config import ModelConfig
from reroute_jax.engine.plain_text import PlainText
from reroute_jax.errors import RerouteError, one_of
from reroute_jax.models import FAMILIES
from reroute_jax.models.family import expand_image_tokens
from reroute_jax.types import Grid

ROLES = ("system", "user", "assistant")
# What runs in a template is somebody's code.
_OF_A_TEMPLATE = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
# Python's and JSON's spelling of a content part: a template that writes one takes strings only.
_WRITTEN_PART = re.compile(r"""['"]type['"]: ?['"](text|image)['"]""")


@dataclass(frozen=True)
class Turn:
    """One message. content: its text, or texts and images in order, an image as None."""

    role: str
    content: str | tuple[str | None, ...]

    @property
    def parts(self) -> tuple[str | None, ...]:
        return (self.content,) if isinstance(self.content, str) else self.content


def split_messages(messages: Sequence[Any]) -> tuple[list[Turn], list[Any]]:
    """Turns, and the images of all of them in order of appearance.

    messages: (role, content) pairs, oldest first; a content is a string, or a list of strings (always text, never a
    path) and images (anything else). Raises RerouteError naming the message that is not of this form.
    """
    if isinstance(messages, str) or not messages:
        raise RerouteError("a chat has no messages: give at least one (role, content) pair")
    turns, images = [], []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, list | tuple) or len(message) != 2:
            raise RerouteError(f"message {number} is a {type(message).__name__}, expected a (role, content) pair")
        role, content = message
        one_of(f"the role of message {number}", role, ROLES)
        if isinstance(content, str):
            turns.append(Turn(role, content))
            continue
        if not isinstance(content, list | tuple) or not content:
            given = "empty" if isinstance(content, list | tuple) else f"a {type(content).__name__}"
            raise RerouteError(
                f"the content of message {number} is {given}, expected a string or a list of strings and images"
            )
        for part in content:
            if part is None or isinstance(part, dict):
                kind = type(part).__name__
                raise RerouteError(f"message {number} has a part that is a {kind}, expected strings and images")
        turns.append(Turn(role, tuple(part if isinstance(part, str) else None for part in content)))
        images += [part for part in content if not isinstance(part, str)]
    return turns, images


def open_layout(folder: Path, tokenizer: Any, config: ModelConfig) -> ChatLayout:
    """The chat layout of the checkpoint in `folder`; the family's built-in template where it has none.

    Raises RerouteError for template files that cannot be read or that name no default.
    """
    from transformers.processing_utils import ProcessorMixin

    family = FAMILIES[config.family]
    try:
        # Where transformers looks: processor_config.json, chat_template.json, chat_template.jinja; the tokenizer last.
        template = ProcessorMixin.get_processor_dict(folder)[0].get("chat_template") or tokenizer.chat_template
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as problem:
        reason = " ".join(str(problem).split())
        raise RerouteError(f"{folder} has a chat template that cannot be read ({reason}): restore it") from problem
    if isinstance(template, dict):
        if "default" not in template:
            raise RerouteError(f"{folder} has chat templates {', '.join(template)}, but no default: name one `default`")
        template = template["default"]
    return ChatLayout(tokenizer, template or family.chat_template, config.image_token, family.opening(config))


@dataclass(frozen=True)
class ChatLayout:
    """How one checkpoint writes chats. template: jinja source. image_token: id of an image's placeholder.

    opening: written before everything else where a chat has no system turn.
    """

    tokenizer: Any
    template: str
    image_token: int
    opening: str = ""

    def question_ids(self, text: str, grids: Sequence[Grid]) -> Int[np.ndarray, " S"]:
        """Ids of a chat of one user turn: images of these grids (rows, columns), then the text."""
        return self.prompt_ids([Turn("user", (*[None] * len(grids), text))], grids)

    def prompt_ids(
        self, turns: Sequence[Turn], grids: Sequence[Grid], *, text_special_tokens: bool = True
    ) -> Int[np.ndarray, " S"]:
        """Ids of a chat up to where the answer begins, each image's placeholder as often as it has visual tokens.

        grids: (rows, columns) of the visual tokens of every image, in order of appearance. text_special_tokens: True
        reads special tokens inside the messages' text as transformers does; False takes all of it for plain text, so
        that it can hold no special token and no placeholder.
        Raises RerouteError for a placeholder in the text that no image belongs to, for half of a surrogate pair in it,
        for a chat that the template refuses, and for text that it leaves out or (False only) changes.
        """
        asked = sum(part is None for turn in turns for part in turn.parts)
        if asked != len(grids):
            raise RerouteError(f"a chat has {asked} images and {len(grids)} grids: give one grid an image")
        for part in (part for turn in turns for part in turn.parts if part is not None):
            _check_characters(part)
        marks = _Marks()
        marked = [_with_texts(turn, marks.put) for turn in turns]
        form, layout = self._fitting_form(marked, marks, asked)
        text = self._render([form(turn) for turn in turns])
        if text_special_tokens:
            # transformers: a template that writes the first token itself gets no other.
            ids = self.tokenizer(text, add_special_tokens=not self._opens_with_bos(text))["input_ids"]
        else:
            pieces = marks.split(layout)
            if "".join(pieces) != text:
                raise RerouteError("the chat template changes a text of this chat, so that it cannot be kept plain")
            ids = self._plain_text.encode(pieces, add_special_tokens=not self._opens_with_bos(layout))
        self._check_placeholders(ids, turns, len(grids))
        return np.array(expand_image_tokens(ids, self.image_token, [rows * columns for rows, columns in grids]))

    @cached_property
    def _plain_text(self) -> PlainText:
        return PlainText.of(self.tokenizer)

    @property
    def _placeholder(self) -> str:
        return self.tokenizer.convert_ids_to_tokens(self.image_token) or ""

    def _fitting_form(self, marked: Sequence[Turn], marks: _Marks, images: int) -> tuple[Callable, str]:
        """The form of messages that the template takes, and the marked chat in it. Templates differ: some want lists
        of parts and lose strings without a word, others write a list's Python form into the prompt."""
        problems = []
        for form in (_as_given, _as_parts, _as_string):
            try:
                layout = self._render([form(turn) for turn in marked])
            except RerouteError as refusal:
                problems.append(str(refusal))
                continue
            found = layout.count(self._placeholder) if self._placeholder else 0
            if _WRITTEN_PART.search(layout):
                continue
            if lost := marks.lost(layout):
                problems.append(f"the chat template leaves out the text {lost[:40]!r}")
            elif found != images:
                problems.append(
                    f"the chat template writes {found} placeholders for {images} images (token {self.image_token} of "
                    f"config.json, {self._placeholder!r} of the tokenizer)"
                )
            else:
                return form, layout
        raise RerouteError(f"{problems[0] if problems else 'the chat template takes no lists'}: change the chat")

    def _render(self, messages: Sequence[dict]) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=True
            )
        except _OF_A_TEMPLATE as problem:
            raise RerouteError(f"the chat template refuses this chat ({' '.join(str(problem).split())})") from problem
        if not self.opening or any(message["role"] == "system" for message in messages):
            return text
        bos = self.tokenizer.bos_token if self._opens_with_bos(text) else ""
        return bos + self.opening + text.removeprefix(bos)

    def _opens_with_bos(self, text: str) -> bool:
        return self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)

    def _check_placeholders(self, ids: Sequence[int], turns: Sequence[Turn], images: int) -> None:
        found = sum(token == self.image_token for token in ids)
        if found == images:
            return
        texts = [part for turn in turns for part in turn.parts if part is not None]
        guilty = next((text for text in texts if self._placeholder in text), None)
        if guilty is None:
            raise RerouteError(
                f"a prompt has {found} image placeholders and {images} images: the tokenizer does not make "
                f"token {self.image_token} of the template's, copy its files from the original checkpoint"
            )
        place = guilty.index(self._placeholder)
        raise RerouteError(
            f"the text {guilty[max(0, place - 20) : place + 40]!r} holds the image placeholder {self._placeholder!r}, "
            "which no image belongs to: take it out, images are placed without it"
        )


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        place = problem.start
        raise RerouteError(
            f"the text {text[max(0, place - 20) : place + 20]!r} holds half of a surrogate pair, which is no "
            "character: take it out"
        ) from None


class _Marks:
    """Stand-ins for the texts of a chat, which nobody can guess and no template looks into."""

    def __init__(self):
        self._nonce = secrets.randbits(128)
        self._pattern = re.compile(rf"\ue000{self._nonce}-(\d+)\ue001")
        self._texts: list[str] = []

    def put(self, text: str) -> str:
        """The text with its middle replaced; space around it stays, because templates trim it."""
        middle = text.strip()
        if not middle:
            return text
        self._texts.append(middle)
        return text.replace(middle, self._mark(len(self._texts) - 1), 1)

    def lost(self, layout: str) -> str | None:
        """The first text whose mark is not in `layout`."""
        found = {int(number) for number in self._pattern.findall(layout)}
        return next((text for number, text in enumerate(self._texts) if number not in found), None)

    def split(self, layout: str) -> list[str]:
        """The template's own pieces and, between them at odd places, the texts."""
        pieces = self._pattern.split(layout)
        return [self._texts[int(piece)] if place % 2 else piece for place, piece in enumerate(pieces)]

    def _mark(self, number: int) -> str:
        return f"\ue000{self._nonce}-{number}\ue001"


def _with_texts(turn: Turn, change: Callable[[str], str]) -> Turn:
    if isinstance(turn.content, str):
        return Turn(turn.role, change(turn.content))
    return Turn(turn.role, tuple(part if part is None else change(part) for part in turn.content))


def _as_given(turn: Turn) -> dict:
    return {"role": turn.role, "content": turn.content} if isinstance(turn.content, str) else _as_parts(turn)


def _as_parts(turn: Turn) -> dict:
    parts = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in turn.parts]
    return {"role": turn.role, "content": parts}


def _as_string(turn: Turn) -> dict:
    return {"role": turn.role, "content": "".join(part for part in turn.parts if part is not None)}
