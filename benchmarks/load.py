"""`python -m benchmarks.load --rates 4 8 16 --requests 200`

Questions about rendered scenes arrive at a server at random, at stated rates, whether it keeps up or not (open loop, a
Poisson process), with images and texts of several lengths and answers of several lengths. Then as many clients as it
can use ask without a pause: its requests a second at saturation. The server is a process of its own, and all plans run
on it in turn; `--url` measures one that runs elsewhere.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from tqdm import tqdm

from evals.scenes.data import refcoco_rows
from reroute_jax.commandline.parsing import (
    DATA,
    OUTPUT,
    ROUTE,
    RUN,
    Parser,
    exit_code,
    positive,
    positive_number,
    whole,
)
from reroute_jax.errors import RerouteError
from reroute_jax.serving.plans import plan_words

TEXTS = (
    "Where is {}?",
    "Is {} in this image? Answer yes or no.",
    "Please provide the bounding box coordinate of the region this sentence describes: {}",
)
PERCENTILES = (50, 95, 99)
_ERROR = 'data: {"error"'  # in the middle of a stream
COLUMNS = ("plan", "rate", "answered", "refused", "first p50", "p95", "p99", "whole p50", "p95", "p99", "goodput/s")


@dataclass(frozen=True)
class Asked:
    """One request, as its body but for the plan."""

    messages: list[dict[str, Any]]
    max_tokens: int


@dataclass(frozen=True)
class Heard:
    """Seconds from when a request was due to its first text and to its end, None where it was not answered."""

    status: int
    first: float | None = None
    whole: float | None = None


@dataclass(frozen=True)
class Target:
    """A server, a model of it, and what it is asked to route by; None for one that knows no routing."""

    client: httpx.AsyncClient
    model: str
    plan: str
    routing: dict[str, Any] | None

    async def ask(self, asked: Asked, due: float) -> Heard:
        """due: on the clock of `time.perf_counter`."""
        routing = {} if self.routing is None else {"routing": self.routing}
        body = {"model": self.model, "messages": asked.messages, "max_tokens": asked.max_tokens, "stream": True}
        first = None
        async with self.client.stream("POST", "/v1/chat/completions", json=body | routing) as response:
            status = response.status_code
            async for line in response.aiter_lines():
                if line.startswith(_ERROR):
                    status = 500
                elif first is None and _has_text(line):
                    first = time.perf_counter() - due
        whole = time.perf_counter() - due
        return Heard(status, first or whole, whole) if status == 200 else Heard(status)


def _has_text(line: str) -> bool:
    if not line.startswith("data: {"):
        return False
    choices = json.loads(line.removeprefix("data: ")).get("choices")
    return bool(choices) and bool(choices[0]["delta"].get("content"))


async def open_loop(target: Target, asked: Sequence[Asked], arrivals: np.ndarray) -> list[Heard]:
    """arrivals: seconds from now, ascending, one of each request."""
    start, sent = time.perf_counter(), []
    for one, arrival in zip(asked, arrivals.tolist(), strict=True):
        await asyncio.sleep(start + arrival - time.perf_counter())
        sent.append(asyncio.create_task(target.ask(one, start + arrival)))
    return list(await asyncio.gather(*sent))


async def closed_loop(target: Target, asked: Sequence[Asked], clients: int) -> float:
    """Requests a second that are answered when each client asks again as soon as it is answered."""
    waiting, answered, start = iter(asked), 0, time.perf_counter()

    async def client() -> None:
        nonlocal answered
        for one in waiting:
            heard = await target.ask(one, time.perf_counter())
            answered += heard.whole is not None

    await asyncio.gather(*(client() for _ in range(clients)))
    return answered / (time.perf_counter() - start)


def summary(plan: str, rate: float, heard: Sequence[Heard], arrivals: np.ndarray, limit: float) -> dict[str, Any]:
    """Of one plan at one rate. limit: seconds for a whole answer, those within are the goodput. answered_per_s: up to
    the end of the last one, which at a rate beyond what the server can do is its saturation."""
    answered = [one for one in heard if one.whole is not None]
    seconds = float(arrivals[-1])
    found = {"plan": plan, "rate_per_s": rate, "requests": len(heard), "answered": len(answered)}
    found["refused"] = len(heard) - len(answered)
    for name in ("first", "whole"):
        values = [getattr(one, name) for one in answered]
        for p in PERCENTILES:
            found[f"{name}_p{p}_s"] = round(float(np.percentile(values, p)), 4) if values else None
    good = sum(one.whole <= limit for one in answered)
    ends = [due + one.whole for one, due in zip(heard, arrivals.tolist(), strict=True) if one.whole is not None]
    found["answered_per_s"] = round(len(ends) / max(ends), 3) if ends else 0.0
    return found | {"limit_s": limit, "good": good, "goodput_per_s": round(good / seconds, 3)}


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: seconds, and goodput a second; saturation below."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for one in (record for record in records if "rate_per_s" in record):
        times = [_shown(one[f"{name}_p{p}_s"]) for name in ("first", "whole") for p in PERCENTILES]
        cells = [one["plan"], one["rate_per_s"], one["answered"], one["refused"], *times, one["goodput_per_s"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "| plan | requests/s at saturation |", "|---|---|"]
    lines += [f"| {one['plan']} | {one['saturated_per_s']} |" for one in records if "saturated_per_s" in one]
    return "\n".join(lines)


def _shown(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.3f}"


async def measure(args: argparse.Namespace, url: str, model: str) -> AsyncIterator[dict[str, Any]]:
    """A record for each plan at each rate, the plans taking turns, and one for each plan at saturation."""
    rng = np.random.default_rng(args.seed)
    asked = questions(args.requests, args.new_tokens, rng)
    key = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=key, limits=limits, timeout=None) as client:
        targets = [Target(client, model, plan, routing) for plan, routing in _plans(args)]
        for target in targets:
            await target.ask(asked[0], time.perf_counter())
        for rate in args.rates:
            arrivals = np.cumsum(rng.exponential(1 / rate, args.requests))
            for target in targets:
                heard = await open_loop(target, asked, arrivals)
                yield summary(target.plan, rate, heard, arrivals, args.limit)
        for target in targets:
            reached = await closed_loop(target, asked, args.clients)
            yield {"plan": target.plan, "clients": args.clients, "saturated_per_s": round(reached, 3)}


def questions(count: int, new_tokens: int, rng: np.random.Generator) -> list[Asked]:
    """Scenes with texts and limits of several lengths."""
    asked = []
    for number, row in enumerate(refcoco_rows("test", count)):
        text = TEXTS[number % len(TEXTS)].format(row["answer"][0])
        image = {"type": "image_url", "image_url": {"url": _data_url(row["image"])}}
        content = [image, {"type": "text", "text": text}]
        limit = int(rng.integers(max(1, new_tokens // 4), new_tokens + 1))
        asked.append(Asked([{"role": "user", "content": content}], limit))
    return asked


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _plans(args: argparse.Namespace) -> list[tuple[str, dict[str, Any] | None]]:
    if args.url is not None:
        return [(args.name, None)]
    return [(text, routing_of(text)) for text in args.plans]


def routing_of(plan: str) -> dict[str, str]:
    """What a request says to be answered by a plan METHOD:BUDGET:ACTION."""
    return dict(zip(("method", "budget", "action"), plan.split(":"), strict=False))


@contextmanager
def server(args: argparse.Namespace) -> Iterator[str]:
    """The address of a server with all plans, which ends with the block."""
    first, *others = args.plans
    method, budget, action = plan_words(first)
    command = [sys.executable, "-m", "reroute_jax.serve", "--model", args.model, "--method", method, "--port", "0"]
    command += ["--budget", str(budget)] if budget is not None else []
    command += ["--action", action] if action is not None else []
    command += [part for plan in others for part in ("--also", plan)]
    command += ["--max-tokens", str(args.new_tokens), "--queue", str(args.queue), *shlex.split(args.serve or "")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            if (found := re.search(r"listening on (\S+)/v1", line)) is None:
                raise RerouteError("the server did not start, its own message stands above")
            yield found[1]
        finally:
            process.send_signal(signal.SIGTERM)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 after one line on bad input."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    with server(args) if args.url is None else nullcontext(args.url) as url:
        model = args.model if args.url is not None else Path(args.model).name
        records = asyncio.run(_recorded(args, url, model))
    print(table(records))


async def _recorded(args: argparse.Namespace, url: str, model: str) -> list[dict[str, Any]]:
    """All records; each is written as soon as it is there."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    records = []
    with args.out.open("w") as file, tqdm(total=len(_plans(args)) * (len(args.rates) + 1), unit="cell") as bar:
        async for record in measure(args, url, model):
            records.append(record)
            file.write(json.dumps(record) + "\n")
            file.flush()
            bar.update()
    return records


def add_server_arguments(parser: Parser) -> None:
    """What `server` takes beside plans and the length of answers."""
    run = parser.group(RUN)
    run.add_argument("--model", default="scenes-llava", help="(default: %(default)s)")
    run.add_argument("--serve", metavar="ARGUMENTS", help="more of them for the server")
    run.add_argument("--queue", type=positive, default=1024, help="of the server (default: %(default)s)")


def _parser() -> Parser:
    examples = (
        "--rates 4 8 16 --requests 200",
        "--plans none pdrop:2/9:delete pdrop:2/9:reroute --serve '--max-batch 16' --out runs/load.jsonl",
        "--url http://127.0.0.1:8000 --model llava-hf/llava-1.5-7b-hf --name transformers",
    )
    parser = Parser("benchmarks.load", __doc__, examples)
    run, data, route = parser.group(RUN), parser.group(DATA), parser.group(ROUTE)
    add_server_arguments(parser)
    run.add_argument("--url", help="of a server that runs already, without /v1 and without routing")
    run.add_argument("--name", default="other", help="of that server in the table (default: %(default)s)")
    run.add_argument("--api-key", help="that it wants")
    data.add_argument(
        "--rates", type=positive_number, nargs="+", default=[4.0, 8.0], help="requests a second (default: %(default)s)"
    )
    data.add_argument("--requests", type=positive, default=100, help="of each cell (default: %(default)s)")
    data.add_argument("--clients", type=positive, default=32, help="at saturation (default: %(default)s)")
    data.add_argument(
        "--new-tokens",
        type=positive,
        default=32,
        help="most of an answer, the least is a quarter (default: %(default)s)",
    )
    data.add_argument(
        "--limit", type=positive_number, default=2.0, help="seconds for a good answer (default: %(default)s)"
    )
    data.add_argument("--seed", type=whole, default=0, help="of arrivals and lengths (default: %(default)s)")
    route.add_argument(
        "--plans",
        nargs="+",
        default=["none", "pdrop:2/9:delete", "pdrop:2/9:reroute"],
        metavar="PLAN",
        help="METHOD, METHOD:BUDGET or METHOD:BUDGET:ACTION (default: %(default)s)",
    )
    parser.group(OUTPUT).add_argument(
        "--out", type=Path, default=Path("runs/load.jsonl"), help="JSON lines, a cell each (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
