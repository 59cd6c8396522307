"""One chat request on its way through the engine: made ready, sent, and heard."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from reroute_jax.engine.answers import Usage
from reroute_jax.engine.batching import Layout
from reroute_jax.serving.answer_text import AnswerText
from reroute_jax.serving.buckets import Pools
from reroute_jax.serving.chat_request import ChatRequest, Served, read_chat_request
from reroute_jax.serving.chat_response import Choice, Delta, ResponseHead
from reroute_jax.serving.engine import Engine, Stopping
from reroute_jax.serving.known_images import KnownImages
from reroute_jax.serving.metrics import Metrics
from reroute_jax.serving.pictures import with_images
from reroute_jax.serving.pool import Pool
from reroute_jax.serving.refusals import Refusal
from reroute_jax.serving.requests import News, Request


@dataclass(frozen=True)
class Desk:
    """All that it takes to answer. hosts: that are asked for images. most_bytes: of a body and of an image's file.
    images: of files. workers: that open them and tokenise, so that the event loop does not wait for them."""

    pools: Pools
    engine: Engine
    served: Served
    metrics: Metrics
    workers: ThreadPoolExecutor
    hosts: frozenset[str]
    most_bytes: int
    images: KnownImages

    @property
    def tokenizer(self) -> Any:
        return self.pools.model.tokenizer


@dataclass(frozen=True)
class Prepared:
    chat: ChatRequest
    pool: Pool
    layout: Layout


def prepare(desk: Desk, body: bytes) -> Prepared:
    """Everything that can be wrong with a request is found here. Raises RerouteError for it."""
    chat = read_chat_request(body, desk.served)
    messages = with_images(chat.messages, desk.hosts, desk.most_bytes, desk.images)
    question = desk.pools.model.question(messages, text_special_tokens=False)
    pool, layout = desk.pools.place(question, chat.plan.schedule)
    return Prepared(replace(chat, messages=[]), pool, layout)


class Conversation:
    """The answers to a prepared request, which has a place in the engine for each of them. They are under way from the
    beginning; `close` takes back from the engine what is not done."""

    def __init__(self, desk: Desk, prepared: Prepared, arrived: float) -> None:
        chat, loop = prepared.chat, asyncio.get_running_loop()
        self.desk, self.chat, self.arrived = desk, chat, arrived
        self.head = ResponseHead(desk.served.model, chat.plan, chat.logprobs)
        self.choices = [Choice(index, AnswerText(desk.tokenizer, chat.stop)) for index in range(chat.count)]
        self.usage: Usage | None = None
        self._news: asyncio.Queue[tuple[int, News]] = asyncio.Queue()

        def teller(index: int) -> Callable[[News], object]:
            def tell(news: News) -> None:
                if not loop.is_closed():  # as a second signal leaves it
                    loop.call_soon_threadsafe(self._news.put_nowait, (index, news))

            return tell

        indices = range(chat.count)
        self._requests = [Request(prepared.layout, chat.sampling, index, teller(index)) for index in indices]
        desk.engine.submit(prepared.pool, self._requests)

    def close(self) -> None:
        for request in self._requests:
            request.cancelled = True

    async def deltas(self) -> AsyncIterator[Delta]:
        """Raises RerouteError where the engine cannot go on."""
        while any(choice.finish_reason is None for choice in self.choices):
            index, news = await self._news.get()
            if self.choices[index].finish_reason is None:
                delta = self._heard(index, news)
                self._requests[index].cancelled = self.choices[index].text.stopped
                yield delta
        self._count()

    async def whole(self) -> dict[str, Any]:
        async for _ in self.deltas():
            pass
        return self.head.whole(self.choices, self.usage)

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        for choice in self.choices:
            yield self.head.opening(choice.index)
        async for delta in self.deltas():
            yield self.head.chunk(delta)
        if self.chat.stream_usage:
            yield self.head.usage_chunk(self.choices, self.usage)

    def _heard(self, index: int, news: News) -> Delta:
        if news.error is not None:
            stopping = isinstance(news.error, Stopping)
            raise news.error if stopping else Refusal(500, str(news.error), "engine_failed")
        if self.usage is None:
            self.desk.metrics.first_token(self.head.plan.name, time.monotonic() - self.arrived)
        self.usage = news.usage
        return self.choices[index].hear(news, self.desk.tokenizer)

    def _count(self) -> None:
        new_tokens = sum(choice.new_tokens for choice in self.choices)
        seconds = time.monotonic() - self.arrived
        self.desk.metrics.answered(self.head.plan.name, seconds, self.usage, new_tokens)
