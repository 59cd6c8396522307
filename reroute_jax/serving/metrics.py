"""What a server counts of its requests, none of their contents."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from reroute_jax.engine.answers import Usage
from reroute_jax.engine.image_cache import ImageCache
from reroute_jax.serving.engine import Engine

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """cache: of images, None for none. compiled: grows with every program that is compiled."""

    def __init__(self, engine: Engine, cache: ImageCache | None, compiled: Sequence[str]) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter("reroute_requests", "Answered, by HTTP status", ["status"], registry=registry)
        self._tokens = Counter("reroute_tokens", "By plan and kind", ["plan", "kind"], registry=registry)
        self._first = Histogram(
            "reroute_first_token_seconds", "From arrival", ["plan"], buckets=_SECONDS, registry=registry
        )
        self._whole = Histogram(
            "reroute_request_seconds", "From arrival to the end", ["plan"], buckets=_SECONDS, registry=registry
        )
        gauges = [
            ("reroute_requests_running", "Answers in slots", lambda: engine.running),
            ("reroute_requests_waiting", "Answers without a slot yet", lambda: engine.waiting),
            ("reroute_programs_compiled", "Since the start; constant while requests are served", lambda: len(compiled)),
        ]
        if cache is not None:
            gauges += [
                ("reroute_image_cache_bytes", "Of device memory", lambda: cache.nbytes),
                ("reroute_image_cache_hits", "Answers whose image was asked about before", lambda: cache.hits),
                ("reroute_image_cache_misses", "Answers whose image was not", lambda: cache.misses),
            ]
        for name, about, value in gauges:
            Gauge(name, about, registry=registry).set_function(value)

    def text(self) -> bytes:
        """For Prometheus."""
        return generate_latest(self._registry)

    def ended(self, status: int) -> None:
        self._requests.labels(status).inc()

    def first_token(self, plan: str, seconds: float) -> None:
        self._first.labels(plan).observe(seconds)

    def answered(self, plan: str, seconds: float, usage: Usage, new_tokens: int) -> None:
        """new_tokens: of all answers to the question."""
        self._whole.labels(plan).observe(seconds)
        for kind, count in (("prompt", usage.prompt_tokens), ("visual", usage.visual_tokens), ("new", new_tokens)):
            self._tokens.labels(plan, kind).inc(count)
