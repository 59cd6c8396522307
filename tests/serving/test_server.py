"""The server as a process on loopback, asked by OpenAI's own client and by clients that misbehave."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tests.checkpoints import smallest
from tests.processes import module_without_torch

ROOT = Path(__file__).parents[2]
KEY = "a-key"
QUEUE = 8
OPTIONS = ["--method", "fastv", "--budget", "3/4", "--first-decision", "1", "--also", "none", "--max-batch", "1"]
OPTIONS += ["--max-text", "32", "--token-budget", "68", "--max-tokens", "33", "--port", "0", "--queue", str(QUEUE)]
OPTIONS += ["--max-body", "1", "--api-key", KEY]
QUESTION = "where is the red cup ?"


def within_seconds(seconds: float, reached: Callable[[], bool]) -> bool:
    """Whether it comes true."""
    end = time.monotonic() + seconds
    while not (found := reached()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


class Server:
    """A process, where it listens, and what it says."""

    def __init__(self, folder: Path, output: Path, *more: str):
        self.output = output
        with output.open("w") as file:
            command = module_without_torch("reroute_jax.serve", "--model", str(folder), *OPTIONS, *more)
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        while (found := re.search(r"listening on (\S+)/v1", output.read_text())) is None:
            assert self.process.poll() is None, output.read_text()
            time.sleep(0.05)
        self.url = found[1]
        self.model = folder.name
        self.programs = self.metric("reroute_programs_compiled")
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)

    def post(self, content: str | bytes | dict, **headers) -> httpx.Response:
        body = json.dumps(content) if isinstance(content, dict) else content
        given = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"} | headers
        return httpx.post(f"{self.url}/v1/chat/completions", content=body, headers=given, timeout=60)

    def asked(self, content=QUESTION, **more) -> dict:
        return {"model": self.model, "messages": [{"role": "user", "content": content}], **more}

    def chat(self, content, **more):
        return self.client.chat.completions.create(**self.asked(content, **more))

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def comes_to_wait(self, count: int) -> bool:
        return within_seconds(30, lambda: self.metric("reroute_requests_waiting") == count)

    def becomes_idle(self) -> bool:
        return within_seconds(
            10, lambda: self.metric("reroute_requests_running") == self.metric("reroute_requests_waiting") == 0
        )


class HalfSent:
    """A request whose client waits in the middle of its body."""

    def __init__(self, server: Server, **asked):
        body = json.dumps(server.asked(**asked)).encode()
        self.rest = body[50:]
        self.connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
        self.connection.putrequest("POST", "/v1/chat/completions")
        self.connection.putheader("Content-Type", "application/json")
        self.connection.putheader("Authorization", f"Bearer {KEY}")
        self.connection.putheader("Content-Length", str(len(body)))
        self.connection.endheaders(body[:50])

    def send_rest(self) -> None:
        self.connection.send(self.rest)

    def status(self) -> int:
        return self.connection.getresponse().status


@pytest.fixture(scope="module")
def servers():
    """Those that were started here: one, unless tests come in another order than they stand."""
    started = []
    yield started
    for one in started:
        one.process.kill()
        one.process.wait()


@pytest.fixture
def server(servers, tmp_path):
    if not servers or servers[-1].process.poll() is not None:
        servers.append(Server(smallest().folder, tmp_path / "output"))
    return servers[-1]


@pytest.fixture(scope="module")
def plans():
    model = smallest()
    return {"none": model.plan("none"), "fastv": model.plan("fastv", budget="3/4", first_decision=1)}


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (84, 84, 3), np.uint8))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def shown(encoded: bytes, text: str = QUESTION) -> list[dict]:
    return with_url(f"data:image/png;base64,{base64.b64encode(encoded).decode()}", text)


def with_url(url: str, text: str = QUESTION) -> list[dict]:
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]


@pytest.mark.parametrize("method", ["fastv", "none"])
def test_an_answer_is_that_of_answer_and_tells_its_cost(server, plans, method):
    found = server.chat(shown(png(picture())), extra_body={"routing": {"method": method}})
    wanted = smallest().answer([(picture(), QUESTION)], schedule=plans[method], max_new_tokens=33)[0]
    assert found.choices[0].message.content == wanted.text
    assert found.choices[0].finish_reason == wanted.finish_reason
    assert found.usage.prompt_tokens == wanted.usage.prompt_tokens
    assert found.usage.completion_tokens == wanted.usage.new_tokens
    routing, layers = found.usage.routing, wanted.usage.visual_tokens_per_layer
    assert (routing["method"], routing["visual_tokens"]) == (method, 36)
    assert routing["visual_tokens_per_layer"] == list(layers)
    assert routing["realised_visual_tokens"] == pytest.approx(sum(layers) / len(layers), abs=1e-3)


def test_a_stream_is_the_same_in_pieces(server, plans):
    wanted = smallest().answer([(picture(), QUESTION)], schedule=plans["fastv"], max_new_tokens=33, logprobs=True)[0]
    more = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True}
    chunks = list(server.chat(shown(png(picture())), **more))
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(choice.delta.content or "" for choice in choices) == wanted.text
    assert len([choice for choice in choices if choice.delta.content]) > 2
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == [wanted.finish_reason]
    logprobs = [entry.logprob for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    np.testing.assert_allclose(logprobs, wanted.logprobs, atol=1e-4)
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == wanted.usage.new_tokens


def test_drawn_answers_are_those_of_copies_of_the_question(server):
    how = {"temperature": 1.5, "top_p": 0.9, "seed": 11}
    found = server.chat(QUESTION, n=2, max_completion_tokens=8, **how)
    wanted = smallest().answer([(None, QUESTION)] * 2, max_new_tokens=8, batch_size=1, **how)
    assert [choice.message.content for choice in found.choices] == [one.text for one in wanted]
    assert wanted[0].text != wanted[1].text
    assert found.usage.completion_tokens == sum(one.usage.new_tokens for one in wanted)
    unseeded = {server.chat(QUESTION, temperature=1.5, max_tokens=8).choices[0].message.content for _ in range(4)}
    assert len(unseeded) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_string_stops_an_answer(server, stream):
    whole = smallest().answer([(None, QUESTION)], max_new_tokens=33)[0].text
    stop = whole[len(whole) // 2 :][:6]
    found = server.chat(QUESTION, stop=["no such words", stop], stream=stream)
    parts = found if stream else [found]
    text = "".join((part.choices[0].delta if stream else part.choices[0].message).content or "" for part in parts)
    assert text == whole[: whole.index(stop)]
    assert server.becomes_idle()


def test_a_chat_has_roles_and_special_tokens_in_text_are_plain(server):
    chat = [("system", "no dog"), ("user", "is <image> </s> red"), ("assistant", "yes"), ("user", "and the cup ?")]
    messages = [{"role": role, "content": content} for role, content in chat]
    found = server.client.chat.completions.create(model=server.model, messages=messages, max_tokens=5)
    wanted = smallest().answer([chat], max_new_tokens=5, text_special_tokens=False)[0]
    assert found.choices[0].message.content == wanted.text
    assert found.usage.prompt_tokens == wanted.usage.prompt_tokens


def test_models_and_health(server):
    model = server.client.models.list().data[0]
    assert model.id == server.model
    assert model.routing == [{"method": "fastv", "budget": "3/4", "action": "reroute"}, {"method": "none"}]
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    if sys.platform == "linux":
        assert server.metric("process_resident_memory_bytes") > 1e8


def test_what_is_wrong_is_told_in_one_line(server):
    broken = [{"role": "user", "content": shown(png(picture())[:500])}]
    half_a_character = [{"role": "user", "content": "\ud800"}]
    for wrong, status, said in (
        ("{", 400, "the body is no JSON"),
        ({"model": "gpt"}, 404, "there is no model 'gpt' here"),
        ({"routing": {"method": "nuwa"}}, 400, "expected one of: fastv 3/4 reroute, none"),
        ({"messages": [{"role": "cat", "content": "hi"}]}, 400, "the role of message 1 is 'cat'"),
        ({"messages": [{"role": "user", "content": "cup " * 99}]}, 400, "this server takes up to 32"),
        ({"messages": broken}, 400, "image 1: the image cannot be decoded"),
        ({"messages": half_a_character}, 400, ""),
    ):
        response = server.post(wrong if isinstance(wrong, str) else server.asked() | wrong)
        error = response.json()["error"]
        assert (response.status_code, set(error)) == (status, {"message", "type", "param", "code"}), wrong
        assert said in error["message"] and "\n" not in error["message"]
        assert error["type"] == "invalid_request_error"


def test_errors_have_their_status(server):
    asked = json.dumps(server.asked())
    assert server.post(asked, **{"Content-Type": "text/plain"}).status_code == 415
    assert server.post(asked, Authorization="Bearer other").status_code == 401
    assert httpx.get(f"{server.url}/metrics").status_code == 401
    unknown = httpx.get(f"{server.url}/v1/completions")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not_found")
    assert httpx.get(f"{server.url}/v1/chat/completions").status_code == 405
    huge = server.post(b" " * 50_000_000)
    assert (huge.status_code, huge.json()["error"]["code"]) == (413, "too_large")
    assert server.becomes_idle()
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="other").models.list()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_makes_room(server, stream):
    before = server.metric('reroute_tokens_total{kind="new",plan="none"}')
    timeout = 60 if stream else 0.01
    asked = server.asked(stream=stream, n=4, routing={"method": "none"})
    with httpx.Client(headers={"Authorization": f"Bearer {KEY}"}, timeout=timeout) as client:
        request = client.build_request("POST", f"{server.url}/v1/chat/completions", json=asked)
        if stream:
            response = client.send(request, stream=True)
            next(response.iter_lines())
            response.close()
        else:
            with pytest.raises(httpx.TimeoutException):
                client.send(request)
    assert server.becomes_idle()
    assert server.metric('reroute_tokens_total{kind="new",plan="none"}') == before


def test_many_clients_get_their_own_answers(server, plans):
    """Forty, as many at once as may wait."""
    items = [(picture(seed), f"how many {what}") for seed, what in enumerate(("cups", "dogs"))]
    texts = {
        (number, method): smallest().answer([item], schedule=plans[method], max_new_tokens=9)[0].text
        for number, item in enumerate(items)
        for method in plans
    }

    def ask(client: int):
        kind = number, method = client % 2, list(plans)[client // 2 % 2]
        content = shown(png(items[number][0]), items[number][1])
        return kind, server.post(server.asked(content, max_tokens=9, routing={"method": method}))

    with ThreadPoolExecutor(QUEUE) as pool:
        for kind, response in pool.map(ask, range(40)):
            assert response.json()["choices"][0]["message"]["content"] == texts[kind]


def test_as_many_may_wait_and_no_more(server):
    """Clients that have sent half of their bodies take all places; then they send the rest and are answered."""
    slow = [HalfSent(server, max_tokens=2) for _ in range(QUEUE)]
    assert server.comes_to_wait(QUEUE)
    refused = server.post(server.asked())
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
    assert refused.json()["error"]["message"] == "8 requests wait and 8 may: try again later"
    for request in slow:
        request.send_rest()
    assert [request.status() for request in slow] == [200] * QUEUE
    assert server.becomes_idle()


def test_nothing_was_compiled_and_nothing_logged(server):
    assert server.programs > 0
    assert server.metric("reroute_programs_compiled") == server.programs
    said = server.output.read_text()
    assert "listening on http://127.0.0.1:" in said
    assert not [word for word in ("cup", "image 1", "POST", "Traceback", KEY) if word in said]


@pytest.mark.slow
def test_later_questions_about_an_image_are_answered_from_what_is_kept(servers, plans, tmp_path):
    server = Server(smallest().folder, tmp_path / "output", "--image-cache", "64")
    servers.insert(0, server)
    encoded = png(picture())
    for number, question in enumerate((QUESTION, "how many cups", "is this a dog")):
        found = server.chat(shown(encoded, question))
        wanted = smallest().answer([(picture(), question)], schedule=plans["fastv"], max_new_tokens=33)[0]
        assert found.choices[0].message.content == wanted.text
        assert (server.metric("reroute_image_cache_misses"), server.metric("reroute_image_cache_hits")) == (1, number)
    server.chat(shown(png(picture(1))))
    assert server.metric("reroute_image_cache_misses") == 2
    assert server.metric("reroute_programs_compiled") == server.programs


def test_at_the_end_what_runs_is_finished_and_what_is_new_is_refused(server):
    """The last test of the file: the server is gone afterwards."""
    wanted = smallest().answer([(None, QUESTION)], max_new_tokens=33)[0].text
    with httpx.Client() as other:
        other.get(f"{server.url}/health")  # a connection that stays open
        accepted = HalfSent(server)  # keeps the server from ending before it has refused
        assert server.comes_to_wait(1)
        stream = server.chat(QUESTION, stream=True, n=QUEUE - 1, max_tokens=33)
        chunks = [next(stream)]
        os.kill(server.process.pid, signal.SIGTERM)
        assert within_seconds(30, lambda: httpx.get(f"{server.url}/health").status_code == 503)
        refused = server.post(server.asked())
        accepted.send_rest()
        chunks += list(stream)
        assert accepted.status() == 200
    texts = {
        index: "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices[0].index == index)
        for index in range(QUEUE - 1)
    }
    assert texts == dict.fromkeys(range(QUEUE - 1), wanted)
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
    assert server.process.wait(timeout=30) == 0
