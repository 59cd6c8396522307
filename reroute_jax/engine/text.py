"""Tokens to text, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

_BROKEN = "\ufffd"  # what a tokenizer makes of bytes that are no whole character yet


class Detokenizer:
    """The text of tokens as they come, cut where characters are whole; together, the text of them all.

    Each token is decoded behind those of the last piece, so that what a tokenizer does at a beginning is done once.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # those of the last piece, which are decoded again as context, and those behind
        self._shown = 0  # of them, those of the last piece

    def add(self, token: int) -> str:
        """What the token completes, often nothing."""
        self._ids.append(token)
        piece = self._new_text()
        if not piece or piece.endswith(_BROKEN):
            return ""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return piece

    def rest(self) -> str:
        """What is left at the end, broken or not."""
        return self._new_text()

    def _new_text(self) -> str:
        return self._text(self._ids)[len(self._text(self._ids[: self._shown])) :]

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def pieces(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """The text of the tokens, a piece as soon as there is one."""
    text = Detokenizer(tokenizer)
    for token in tokens:
        if piece := text.add(token):
            yield piece
    if rest := text.rest():
        yield rest
