"""A process that serves: its socket, its start, and its orderly end."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import uvicorn
from tqdm import tqdm

from reroute_jax.engine.compilation import compilations
from reroute_jax.engine.image_cache import ImageCache
from reroute_jax.engine.model import Model
from reroute_jax.routing.plan import Schedule
from reroute_jax.serving.app import Service
from reroute_jax.serving.buckets import Limits, Pools, kinds, make_pool
from reroute_jax.serving.chat_request import Served
from reroute_jax.serving.conversation import Desk
from reroute_jax.serving.engine import Engine
from reroute_jax.serving.known_images import KnownImages
from reroute_jax.serving.metrics import Metrics
from reroute_jax.serving.plans import Plan

WORKERS = 4  # threads that open images and tokenise
MOST_FILES = 65_536


@dataclass(frozen=True)
class Options:
    """name: of the model, for clients. most_waiting: requests without a slot. most_bytes: of a body. hosts: that images
    are fetched from. api_key: None lets everybody in."""

    name: str
    limits: Limits
    most_waiting: int
    most_bytes: int
    hosts: frozenset[str]
    api_key: str | None


def open_socket(host: str, port: int) -> socket.socket:
    """Taken before anything is loaded, so that a port in use is told at once. Raises OSError."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    return listener


def serve(model: Model, plans: Sequence[Plan], options: Options, listener: socket.socket) -> None:
    """Until SIGTERM or Ctrl-C: then what was accepted is answered, and what is new gets 503. A second signal ends all.

    Raises RerouteError for limits that hold no prompt.
    """
    schedules = [plan.schedule for plan in plans]
    with compilations() as compiled, ThreadPoolExecutor(WORKERS, "prepare") as workers:
        pools, cache = _all_pools(model, schedules, options.limits)
        engine = Engine(pools.all, options.limits.token_budget, options.most_waiting)
        try:
            desk = Desk(
                pools,
                engine,
                Served.of(options.name, model.config, plans, options.limits.new_tokens, options.most_waiting),
                Metrics(engine, cache, compiled),
                workers,
                options.hosts,
                options.most_bytes,
                KnownImages(model.image, options.limits.image_cache),
            )
            _allow_connections()
            _Server(Service(desk, options.api_key, int(time.time()))).run([listener])
        finally:
            engine.close()


def _all_pools(model: Model, schedules: Sequence[Schedule], limits: Limits) -> tuple[Pools, ImageCache | None]:
    cache = model.image_cache(limits.image_cache) if limits.image_cache else None
    asked = tqdm(kinds(model, schedules, limits), desc="compiling", unit="pool")
    pools = Pools(model, limits, tuple(make_pool(model, kind, limits, cache) for kind in asked))
    if cache is not None:
        cache.clear()  # of the examples
    return pools, cache


def _allow_connections() -> None:
    """Each is a file, and the usual limit is 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(MOST_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class _Server(uvicorn.Server):
    """One that says where it listens, and answers what it accepted before it ends."""

    def __init__(self, service: Service) -> None:
        # Neither requests nor addresses of clients are logged.
        super().__init__(uvicorn.Config(service.app(), access_log=False, log_level="warning", lifespan="off"))
        self.service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = sockets[0].getsockname()[:2]
        print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)

    def handle_exit(self, sig: int, frame) -> None:
        if self.service.draining:
            super().handle_exit(sig, frame)
        self.service.draining = True

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or (self.service.draining and not self.service.open)
