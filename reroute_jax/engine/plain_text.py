"""Tokenising text from strangers: nothing in it is read as a special token, all else stays as it was."""

from __future__ import annotations

import json
import re
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from reroute_jax.errors import RerouteError


@dataclass(frozen=True)
class PlainText:
    """A copy of a tokenizer in which every control token has a name that nobody can guess.

    names: each control token's text -> its name in the copy. ids: each control token's text -> its id. Control tokens
    are those flagged special, and the added ones that no ordinary text is tokenised to. The copy does everything else
    as the original: merges across borders, spaces before and behind special tokens, the first token.
    """

    copy: Tokenizer
    names: Mapping[str, str]
    ids: Mapping[str, int]
    unknown: int | None

    @classmethod
    def of(cls, tokenizer: Any) -> PlainText:
        """Raises RerouteError for a tokenizer that is not of the `tokenizers` library."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise RerouteError(
                f"text cannot be kept plain with a {type(tokenizer).__name__}: give the checkpoint its tokenizer.json"
            )
        ordinary = backend.get_vocab(with_added_tokens=False)
        control = {
            token.content: number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special or (token.content not in ordinary and not token.content.isspace())
        }
        nonce = secrets.randbits(128)
        names = {text: f"\ue000{nonce}-{number}\ue001" for text, number in control.items()}
        copy = Tokenizer.from_str(json.dumps(_renamed(json.loads(backend.to_str()), names)))
        moved = [text for text, name in names.items() if copy.token_to_id(name) != control[text]]
        if moved:
            raise RerouteError(f"text cannot be kept plain with this tokenizer: {moved[0]!r} has no place in its model")
        return cls(copy, names, control, tokenizer.unk_token_id)

    def encode(self, pieces: Sequence[str], *, add_special_tokens: bool) -> list[int]:
        """Ids of the pieces joined. Control tokens are read in the even ones (0, 2, ...) alone.

        Raises RerouteError where the tokenizer makes a control token of plain text.
        """
        own = [self._control.sub(lambda found: self.names[found[0]], piece) for piece in pieces[::2]]
        joined = list(pieces)
        joined[::2] = own
        ids = self.copy.encode("".join(joined), add_special_tokens=add_special_tokens).ids
        added = self.copy.encode("", add_special_tokens=add_special_tokens).ids
        written = Counter(self.ids[text] for piece in pieces[::2] for text in self._control.findall(piece))
        control = set(self.ids.values()) - {self.unknown}
        found = Counter(token for token in ids if token in control)
        if found - written - Counter(added):
            raise RerouteError("the tokenizer makes a special token of plain text, so that it cannot be kept plain")
        return ids

    @cached_property
    def _control(self) -> re.Pattern:
        return re.compile("|".join(map(re.escape, sorted(self.names, key=len, reverse=True))) or "(?!)")


def _renamed(state: dict, names: Mapping[str, str]) -> dict:
    """`tokenizer.json` with control tokens under other names, in the same places."""
    model = state["model"]
    if isinstance(model["vocab"], dict):
        # Added tokens get a place in the model's vocabulary, which keeps their ids.
        added = {token["content"]: token["id"] for token in state["added_tokens"]}
        model["vocab"] = {names.get(text, text): number for text, number in (model["vocab"] | added).items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    return state | {"truncation": None, "padding": None}
