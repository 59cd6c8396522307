"""`python -m benchmarks.server_memory --requests 10000 --serve "--image-cache 8"`

Resident memory of a server after each tenth of so many requests with images, from clients that ask again as soon as
they are answered. The images come again after `--images` requests, so that an image cache that holds fewer must let
some leave.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from tqdm import tqdm

from benchmarks.load import Target, add_server_arguments, closed_loop, questions, routing_of, server
from reroute_jax.commandline.parsing import DATA, OUTPUT, ROUTE, Parser, exit_code, positive
from reroute_jax.errors import RerouteError

PARTS = 10
RESIDENT = re.compile(r"^process_resident_memory_bytes (\S+)$", re.MULTILINE)


async def measure(args: argparse.Namespace, url: str) -> AsyncIterator[dict[str, Any]]:
    """A record before the first request, and one after each tenth of them."""
    asked = questions(args.images, args.new_tokens, np.random.default_rng(0))
    order = [asked[number % len(asked)] for number in range(args.requests)]
    plan = args.plans[0]
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        target = Target(client, Path(args.model).name, plan, routing_of(plan))
        yield {"requests": 0, "resident_mb": await resident(client)}
        for part in range(PARTS):
            first, end = (args.requests * edge // PARTS for edge in (part, part + 1))
            rate = await closed_loop(target, order[first:end], args.clients)
            found = {"requests": end, "resident_mb": await resident(client)}
            yield found | {"answered_per_s": round(rate, 1)}


async def resident(client: httpx.AsyncClient) -> float:
    """Millions of bytes, by the server's own /metrics."""
    found = RESIDENT.search((await client.get("/metrics")).text)
    if found is None:
        raise RerouteError("the server's /metrics does not tell its memory: run this on Linux")
    return round(float(found[1]) / 1e6, 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 after one line on bad input."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    with server(args) as url:
        asyncio.run(_recorded(args, url))


async def _recorded(args: argparse.Namespace, url: str) -> None:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w") as file, tqdm(total=args.requests, unit="request") as bar:
        async for record in measure(args, url):
            file.write(json.dumps(record) + "\n")
            file.flush()
            bar.update(record["requests"] - bar.n)
            tqdm.write("  ".join(f"{name} {value}" for name, value in record.items()))


def _parser() -> Parser:
    examples = (
        "--requests 10000",
        '--requests 10000 --images 200 --serve "--image-cache 8"',
        '--plans pdrop:2/9:delete --serve "--max-batch 16"',
    )
    parser = Parser("benchmarks.server_memory", __doc__, examples)
    add_server_arguments(parser)
    data = parser.group(DATA)
    data.add_argument("--requests", type=positive, default=10000, help="(default: %(default)s)")
    data.add_argument("--images", type=positive, default=100, help="that differ (default: %(default)s)")
    data.add_argument("--clients", type=positive, default=16, help="(default: %(default)s)")
    data.add_argument("--new-tokens", type=positive, default=4, help="most of an answer (default: %(default)s)")
    parser.group(ROUTE).add_argument(
        "--plans",
        nargs=1,
        default=["pdrop:2/9:reroute"],
        metavar="PLAN",
        help="as of benchmarks.load (default: %(default)s)",
    )
    parser.group(OUTPUT).add_argument(
        "--out", type=Path, default=Path("runs/server_memory.jsonl"), help="JSON lines (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
