"""Answers in OpenAI's form: as wholes, and in chunks as they come."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from reroute_jax.engine.answers import Usage
from reroute_jax.serving.answer_text import AnswerText
from reroute_jax.serving.plans import Plan
from reroute_jax.serving.requests import News


@dataclass(frozen=True)
class Delta:
    """What news add to one answer. logprobs: an entry for each token."""

    index: int
    text: str
    logprobs: list[dict[str, Any]]
    finish_reason: str | None


@dataclass
class Choice:
    """One answer as it comes. new_tokens: with the id that ended it."""

    index: int
    text: AnswerText
    new_tokens: int = 0
    finish_reason: str | None = None
    shown: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def hear(self, news: News, tokenizer: Any) -> Delta:
        """news: none of an error. Behind a string that stops the answer nothing is heard any more."""
        texts, entries, reason = [], [], news.finish_reason
        for token, logprob in zip(news.tokens, news.logprobs, strict=True):
            texts.append(self.text.add(token))
            entries.append(_token_logprob(tokenizer.decode([token]), logprob))
            if self.text.stopped:
                break
        before = self.new_tokens
        self.new_tokens = news.usage.new_tokens
        if reason is not None and not self.text.stopped:
            texts.append(self.text.rest())
        if self.text.stopped:
            reason, self.new_tokens = "stop", before + len(entries)
        self.finish_reason = reason
        delta = Delta(self.index, "".join(texts), entries, reason)
        self.shown.append(delta.text)
        self.logprobs += entries
        return delta


def _token_logprob(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}


@dataclass(frozen=True)
class ResponseHead:
    """What all parts of a response begin with."""

    model: str
    plan: Plan
    logprobs: bool
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """chat.completion."""
        shown = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": "".join(choice.shown), "refusal": None},
                "logprobs": {"content": choice.logprobs, "refusal": None} if self.logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        return self._object("chat.completion", shown) | {"usage": self.usage(choices, usage)}

    def opening(self, index: int) -> dict[str, Any]:
        """The first chat.completion.chunk of an answer."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None, None)

    def chunk(self, delta: Delta) -> dict[str, Any]:
        logprobs = {"content": delta.logprobs, "refusal": None} if self.logprobs else None
        said = {"content": delta.text} if delta.text else {}
        return self._chunk(delta.index, said, logprobs, delta.finish_reason)

    def usage_chunk(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        return self._object("chat.completion.chunk", []) | {"usage": self.usage(choices, usage)}

    def usage(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """OpenAI's counts, and below "routing" the plan and what it let run: visual tokens of the prompt; those that a
        decoder layer ran, on average and by layer."""
        new = sum(choice.new_tokens for choice in choices)
        layers = usage.visual_tokens_per_layer
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": usage.prompt_tokens + new,
            "routing": {
                **self.plan.words,
                "visual_tokens": usage.visual_tokens,
                "realised_visual_tokens": round(sum(layers) / len(layers), 3),
                "visual_tokens_per_layer": list(layers),
            },
        }

    def _chunk(self, index: int, delta: dict, logprobs: dict | None, finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._object("chat.completion.chunk", [choice])

    def _object(self, kind: str, choices: list[dict]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}
