"""The text of an answer as its tokens come, up to the first of some strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reroute_jax.engine.text import Detokenizer


class AnswerText:
    """stops: strings that end it, not empty; what may become one is held back until it is clear."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokens, self._stops, self._held = Detokenizer(tokenizer), tuple(stops), ""

    def add(self, token: int) -> str:
        """What can be shown now."""
        return self._shown(self._tokens.add(token))

    def rest(self) -> str:
        """What is left when no more tokens come."""
        shown = self._shown(self._tokens.rest())
        if self.stopped:
            return shown
        held, self._held = self._held, ""
        return shown + held

    def _shown(self, piece: str) -> str:
        text, self._held = self._held + piece, ""
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        held = max((_beginning(text, stop) for stop in self._stops), default=0)
        shown, self._held = text[: len(text) - held], text[len(text) - held :]
        return shown


def _beginning(text: str, stop: str) -> int:
    """Characters at the end of a text that are the beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
