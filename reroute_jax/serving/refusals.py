"""What a client is told when its request is not answered: the status, and one line in OpenAI's form."""

from __future__ import annotations

from typing import Any

from reroute_jax.errors import RerouteError
from reroute_jax.serving.buckets import Unplaced
from reroute_jax.serving.engine import Busy, Stopping

RETRY_SECONDS = 1
_LONGEST = 1000  # of a message, in characters: what is quoted of a request may have its 20 MB


class Refusal(RerouteError):
    """status: of HTTP. code: for programs. param: which part of the request is wrong."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    @property
    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        kind = "server_error" if self.status >= 500 else kind
        return {"error": {"message": _short(str(self)), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(RETRY_SECONDS)} if self.status in (429, 503) else {}


def _short(message: str) -> str:
    return message if len(message) <= _LONGEST else f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"


def refusal_of(error: RerouteError) -> Refusal:
    """Of an error that a request caused."""
    match error:
        case Refusal():
            return error
        case Busy():
            return Refusal(429, str(error), "busy")
        case Stopping():
            return Refusal(503, str(error), "stopping")
        case Unplaced():
            return Refusal(400, str(error), "context_length_exceeded", "messages")
        case _:
            return Refusal(400, " ".join(str(error).split()), "invalid_value")
