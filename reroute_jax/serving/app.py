"""The endpoints."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from reroute_jax.errors import RerouteError
from reroute_jax.serving import metrics
from reroute_jax.serving.body import read_body
from reroute_jax.serving.conversation import Conversation, Desk, Prepared, prepare
from reroute_jax.serving.refusals import Refusal, refusal_of

log = logging.getLogger("reroute_jax")

CLIENT_LEFT = 499  # as nginx counts it; nobody reads it
Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass
class Service:
    """What the endpoints share. api_key: None lets everybody in. open: chat requests that are not answered yet.
    draining: whether new ones are refused."""

    desk: Desk
    api_key: str | None
    started: int
    open: int = 0
    draining: bool = False

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/health", self._told(self.health)),
                Route("/metrics", self._told(self.metrics, guarded=True)),
                Route("/v1/models", self._told(self.models, guarded=True)),
                Route("/v1/chat/completions", self._told(self.chat, guarded=True), methods=["POST"]),
            ],
            exception_handlers={HTTPException: _no_such_endpoint},
        )

    async def health(self, request: Request) -> Response:
        """503 as soon as no request is taken any more."""
        if not self.desk.engine.alive:
            raise Refusal(503, "the engine has ended", "stopping")
        if self.draining:
            raise Refusal(503, "the server stops", "stopping")
        return _json({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        return Response(self.desk.metrics.text(), media_type=metrics.CONTENT_TYPE)

    async def models(self, request: Request) -> Response:
        plans = [plan.words for plan in self.desk.served.plans]
        model = {"id": self.desk.served.model, "object": "model", "created": self.started, "owned_by": "reroute_jax"}
        return _json({"object": "list", "data": [model | {"routing": plans}]})

    async def chat(self, request: Request) -> Response:
        arrived = time.monotonic()
        await self.health(request)
        self.desk.engine.take_places(1)
        self.open += 1
        try:
            conversation = Conversation(self.desk, await self._prepared(request), arrived)
        except BaseException:
            self.open -= 1
            raise
        if conversation.chat.stream:
            return _Events(_events(conversation), partial(self._close, conversation))
        try:
            answer = await _unless_left(request, conversation.whole())
        finally:
            self._close(conversation)
        return Response(status_code=CLIENT_LEFT) if answer is None else _json(answer)

    async def _prepared(self, request: Request) -> Prepared:
        """With a place in the engine for each answer."""
        places = 1
        try:
            body = await read_body(request, self.desk.most_bytes)
            loop = asyncio.get_running_loop()
            prepared = await loop.run_in_executor(self.desk.workers, prepare, self.desk, body)
            self.desk.engine.take_places(prepared.chat.count - places)
        except BaseException:
            self.desk.engine.give_places(places)
            raise
        return prepared

    def _close(self, conversation: Conversation) -> None:
        conversation.close()
        self.open -= 1

    def _told(self, endpoint: Endpoint, guarded: bool = False) -> Endpoint:
        """Errors as answers, all of them counted, and the key asked for."""

        async def answered(request: Request) -> Response:
            try:
                if guarded:
                    self._check_key(request)
                response = await endpoint(request)
            except ClientDisconnect:
                response = Response(status_code=CLIENT_LEFT)
            except RerouteError as error:
                response = _refused(refusal_of(error))
            except Exception as defect:
                # Its message may hold a part of the request, its place does not.
                place = "".join(traceback.format_tb(defect.__traceback__))
                log.error("a request failed with %s:\n%s", type(defect).__name__, place)
                response = _refused(Refusal(500, "the server failed on this request", "internal_error"))
            self.desk.metrics.ended(response.status_code)
            return response

        return answered

    def _check_key(self, request: Request) -> None:
        if self.api_key is None:
            return
        kind, _, key = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self.api_key.encode()):
            raise Refusal(401, "this server wants its key: Authorization: Bearer KEY", "invalid_api_key")


class _Events(StreamingResponse):
    """Server-sent events. close: is called at the end, and as soon as the client leaves."""

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.close = close

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.close()


async def _events(conversation: Conversation) -> AsyncIterator[str]:
    """An error comes as an event: the status has gone out."""
    try:
        async for chunk in conversation.chunks():
            yield f"data: {json.dumps(chunk)}\n\n"
    except RerouteError as error:
        yield f"data: {json.dumps(refusal_of(error).body)}\n\n"
    yield "data: [DONE]\n\n"


async def _unless_left(request: Request, work: Awaitable[dict[str, Any]]) -> dict[str, Any] | None:
    """What the work gives; None, and the work is cancelled, where the client leaves before."""
    answering, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await answering if answering.done() else None
    finally:
        for task in (answering, leaving):
            task.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _no_such_endpoint(request: Request, error: HTTPException) -> Response:
    where = f"{request.method} {request.url.path}"
    return _refused(Refusal(error.status_code, f"{where[:200]}: {error.detail}", "not_found"))


def _refused(refusal: Refusal) -> Response:
    return _json(refusal.body, refusal.status, refusal.headers)


def _json(content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(content), status, headers, media_type="application/json")
