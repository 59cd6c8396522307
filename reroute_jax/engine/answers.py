"""What comes back: answers, what they cost, and what went wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from reroute_jax.engine.trace import Trace
from reroute_jax.errors import RerouteError


@dataclass(frozen=True)
class Usage:
    """Of one question. prompt_tokens, visual_tokens: of the prompt, and of its images alone, before any merge.
    visual_tokens_per_layer: as each decoder layer ran them. kv_bytes: of the keys and values of prompt and answer."""

    prompt_tokens: int
    visual_tokens: int
    visual_tokens_per_layer: tuple[int, ...]
    new_tokens: int
    kv_bytes: int


@dataclass(frozen=True)
class Answer:
    """text: without special tokens. token_ids: without the id that ended it. finish_reason: "stop" or "length"; None
    with an error. logprobs: of each token, the model's own (temperature 1, no penalty); where asked for, as `trace`.
    error: why there is no answer."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    logprobs: tuple[float, ...] | None = None
    trace: Trace | None = None
    usage: Usage | None = None
    error: RerouteError | None = None


class AnswerError(RerouteError):
    """Questions that cannot be answered. answers: of all questions of the call in order, those with an `error` too."""

    def __init__(self, message: str, answers: Sequence[Answer]) -> None:
        super().__init__(message)
        self.answers = list(answers)


def raise_errors(answers: Sequence[Answer]) -> None:
    """Raises AnswerError for the first question that went wrong, telling of the others."""
    wrong = [answer.error for answer in answers if answer.error is not None]
    if not wrong:
        return
    others = f" ({len(wrong)} of {len(answers)} questions; the error's `answers` hold the rest)" * (len(answers) > 1)
    raise AnswerError(f"{wrong[0]}{others}", answers) from wrong[0]


@dataclass
class AnswerTokens:
    """Tokens of one row as they come. stop: ids that end it."""

    stop: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False

    def add(self, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """tokens, logprobs: `[steps]` of a segment, -1 behind the end."""
        for token, logprob in zip(tokens.tolist(), logprobs.tolist(), strict=True):
            if token < 0 or self.stopped:
                return
            if token in self.stop:
                self.stopped = True
            else:
                self.tokens.append(token)
                self.logprobs.append(logprob)
