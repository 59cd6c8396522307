"""What the benchmark of a server's memory reads, without a server."""

import asyncio
from types import SimpleNamespace

import httpx
import pytest

from benchmarks import server_memory
from reroute_jax.errors import RerouteError

ARGUMENTS = {"images": 2, "new_tokens": 2, "requests": 25, "clients": 3, "plans": ["pdrop:2/9:reroute"]}


def test_a_line_for_each_tenth_of_the_requests(monkeypatch):
    """Every request is sent once, on the plan that was asked for."""
    asked, sizes = [], iter(range(100, 200))

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/metrics":
            return httpx.Response(200, text=f"# HELP x\nprocess_resident_memory_bytes {next(sizes)}e6\n")
        asked.append(request.content)
        return httpx.Response(200, text='data: {"choices": [{"delta": {"content": "no"}}]}\n\n')

    client = httpx.AsyncClient
    transport = httpx.MockTransport(answer)
    monkeypatch.setattr(httpx, "AsyncClient", lambda **how: client(transport=transport, **how))

    async def records():
        args = SimpleNamespace(model="folder/tiny", **ARGUMENTS)
        return [record async for record in server_memory.measure(args, "http://server")]

    found = asyncio.run(records())
    assert [one["requests"] for one in found] == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25]
    assert [one["resident_mb"] for one in found] == list(range(100, 111))
    assert len(asked) == 25 and len(set(asked)) == 2
    wanted = b'"routing":{"method":"pdrop","budget":"2/9","action":"reroute"}'
    assert all(b'"model":"tiny"' in body and wanted in body for body in asked)


def test_a_server_that_does_not_tell_its_memory_is_named():
    async def read():
        transport = httpx.MockTransport(lambda request: httpx.Response(200, text="reroute_requests_running 0\n"))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            await server_memory.resident(client)

    with pytest.raises(RerouteError, match="does not tell its memory"):
        asyncio.run(read())
