"""The body of a request, within limits."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from reroute_jax.serving.refusals import Refusal

SECONDS = 60
DRAINED = 2**28  # bytes


async def read_body(request: Request, most_bytes: int) -> bytes:
    """Raises Refusal for one that is no JSON by its name, too large, or too slow.

    What is too large is received and dropped, up to `DRAINED` bytes: a client that still sends does not read
    why it was refused.
    """
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, f"the body is {kind or 'of no type'}, expected Content-Type: application/json")
    parts, size = [], 0
    try:
        async with asyncio.timeout(SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= most_bytes:
                    parts.append(part)
                elif size <= DRAINED:
                    parts.clear()
                else:
                    break
    except TimeoutError:
        raise Refusal(408, f"the body took more than {SECONDS} seconds, send it faster", "timeout") from None
    if size > most_bytes:
        raise Refusal(413, f"the body has more than {most_bytes} bytes: send smaller images", "too_large")
    return b"".join(parts)
