"""From the body of a chat request to what is asked, every field checked."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any

from reroute_jax.config import ModelConfig
from reroute_jax.engine.sampling import Sampling
from reroute_jax.serving.plans import Plan, plan_asked_for
from reroute_jax.serving.refusals import Refusal

MOST_CHOICES, MOST_STOPS = 8, 4

# What these ask for by any other value, this server does not do.
_NEUTRAL = {
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "logit_bias": ({}, None),
    "top_logprobs": (0, None),
    "tools": ([], None),
    "tool_choice": ("none", "auto", None),
    "response_format": ({"type": "text"}, None),
    "modalities": (["text"], None),
}
# These change no answer.
_UNUSED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
# What a message may bear. An answer that is sent back has empty fields of its own, which say nothing.
_OF_MESSAGE = {"role", "content", "name"}


@dataclass(frozen=True)
class ImageUrl:
    """An image of a message."""

    url: str


@dataclass(frozen=True)
class Served:
    """What requests are checked against. new_tokens: of an answer, at most. choices: of a request, at most, none of
    which may be more than can wait. stop: ids that end an answer."""

    model: str
    plans: Sequence[Plan]
    new_tokens: int
    choices: int
    stop: tuple[int, ...]
    repetition_penalty: float

    @classmethod
    def of(cls, model: str, config: ModelConfig, plans: Sequence[Plan], new_tokens: int, waiting: int) -> Served:
        choices = min(MOST_CHOICES, waiting)
        return cls(model, plans, new_tokens, choices, config.eos_tokens, config.repetition_penalty)


@dataclass(frozen=True)
class ChatRequest:
    """messages: (role, content) pairs; a content is a string, or a list of strings and `ImageUrl`s. count: of answers.
    stop: strings that end one."""

    messages: list[tuple[str, str | list[str | ImageUrl]]]
    plan: Plan
    sampling: Sampling
    count: int
    stop: tuple[str, ...]
    stream: bool
    stream_usage: bool
    logprobs: bool


def read_chat_request(body: bytes, served: Served) -> ChatRequest:
    """Raises RerouteError, most of them a Refusal, for whatever is not as it should be."""
    given = _object(body)
    known = {"model", "messages", "routing", "stream", "stream_options", "max_tokens", "max_completion_tokens"}
    known |= {"temperature", "top_p", "seed", "stop", "logprobs", "n", *_NEUTRAL, *_UNUSED}
    for name in given:
        if name not in known:
            raise Refusal(400, f"{name!r} is no parameter of this server, leave it out", "unknown_parameter", name)
    for name, neutral in _NEUTRAL.items():
        if given.get(name) not in neutral:
            raise _wrong(given, name, f"nothing but {json.dumps(neutral[0])}, others are not implemented")
    if given.get("model") != served.model:
        message = f"there is no model {given.get('model')!r} here, expected {served.model!r}"
        raise Refusal(404, message, "model_not_found", "model")
    stream = _boolean(given, "stream")
    options = _of_type(given, "stream_options", dict, {}, "an object")
    return ChatRequest(
        messages=_messages(given),
        plan=plan_asked_for(served.plans, given.get("routing")),
        sampling=Sampling(
            temperature=_of_type(given, "temperature", int | float, 0.0, "a number"),
            top_p=_of_type(given, "top_p", int | float, 1.0, "a number"),
            repetition_penalty=served.repetition_penalty,
            stop=served.stop,
            limit=_limit(given, served.new_tokens),
            seed=_of_type(given, "seed", int, secrets.randbits(32), "a whole number"),
        ),
        count=_whole(given, "n", 1, served.choices),
        stop=_stops(given),
        stream=stream,
        stream_usage=_boolean(options, "include_usage"),
        logprobs=_boolean(given, "logprobs"),
    )


def _object(body: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    try:
        given = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise Refusal(400, f"the body is no JSON ({reason})", "invalid_json") from None
    if not isinstance(given, dict):
        raise Refusal(400, "the body is no JSON object, expected one with `model` and `messages`", "invalid_json")
    return given


def _messages(given: dict[str, Any]) -> list[tuple[str, str | list[str | ImageUrl]]]:
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _wrong(given, "messages", "a list of at least one message")
    return [_message(number, message) for number, message in enumerate(messages, 1)]


def _message(number: int, message: Any) -> tuple[str, str | list[str | ImageUrl]]:
    expected = 'a message {"role": ..., "content": ...} with a string or a list of parts'
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Refusal(400, f"message {number} is not {expected}", "invalid_value", "messages")
    if said := [name for name, value in message.items() if value and name not in _OF_MESSAGE]:
        known = "expected role and content alone, with images among its parts"
        raise Refusal(400, f"message {number} has {said[0][:40]!r}, {known}", "unknown_parameter", "messages")
    content = message.get("content")
    if isinstance(content, str):
        return message["role"], content
    if not isinstance(content, list) or not content:
        raise Refusal(400, f"the content of message {number} is not that of {expected}", "invalid_value", "messages")
    return message["role"], [_part(number, part) for part in content]


def _part(number: int, part: Any) -> str | ImageUrl:
    match part:
        case {"text": _, "image_url": _} | {"image": _} | {"images": _}:
            pass  # one of them would be overlooked
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "image_url", "image_url": {"url": str(url)}} | {"type": "image_url", "image_url": str(url)}:
            return ImageUrl(url)
    expected = '{"type": "text", "text": ...} or {"type": "image_url", "image_url": {"url": ...}}'
    raise Refusal(400, f"message {number} has a part that is neither {expected}", "invalid_value", "messages")


def _limit(given: dict[str, Any], most: int) -> int:
    names = [name for name in ("max_completion_tokens", "max_tokens") if given.get(name) is not None]
    if len(names) > 1:
        raise _wrong(given, "max_tokens", "only one of max_tokens and max_completion_tokens")
    return _whole(given, names[0], most, most) if names else most


def _stops(given: dict[str, Any]) -> tuple[str, ...]:
    stop = given.get("stop")
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or not all(isinstance(one, str) and one for one in stops) or len(stops) > MOST_STOPS:
        raise _wrong(given, "stop", f"a string, or up to {MOST_STOPS} of them")
    return tuple(stops)


def _whole(given: dict[str, Any], name: str, default: int, most: int) -> int:
    value = _given(given, name, default)
    if type(value) is not int or not 1 <= value <= most:
        raise _wrong(given, name, f"a whole number from 1 to {most}")
    return value


def _boolean(given: dict[str, Any], name: str) -> bool:
    return _of_type(given, name, bool, False, "true or false")


def _of_type(given: dict[str, Any], name: str, kind: type | UnionType, default: Any, expected: str) -> Any:
    value = _given(given, name, default)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _wrong(given, name, expected)
    return value


def _given(given: dict[str, Any], name: str, default: Any) -> Any:
    """null is as good as nothing."""
    value = given.get(name)
    return default if value is None else value


def _wrong(given: dict[str, Any], name: str, expected: str) -> Refusal:
    shown = json.dumps(given.get(name))[:100]
    return Refusal(400, f"{name} is {shown}, expected {expected}", "invalid_value", name)
