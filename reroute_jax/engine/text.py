"""Tokens to text, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

_BROKEN = "\ufffd"  # what a tokenizer makes of bytes that are no whole character yet


def pieces(tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of the tokens as they come, cut where characters are whole; together, the text of them all.

    Each token is decoded behind those of the last piece, so that what a tokenizer does at a beginning is done once.
    """
    ids: list[int] = []
    start = shown = 0  # ids[start:shown] have been given out, and are decoded again as context

    def text(part: list[int]) -> str:
        return tokenizer.decode(part, skip_special_tokens=True)

    for token in tokens:
        ids.append(token)
        before, now = text(ids[start:shown]), text(ids[start:])
        if len(now) > len(before) and not now.endswith(_BROKEN):
            yield now[len(before) :]
            start, shown = shown, len(ids)
    if rest := text(ids[start:])[len(text(ids[start:shown])) :]:
        yield rest
