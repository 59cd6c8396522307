"""What the engine is asked for, and what it tells while it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from reroute_jax.engine.answers import Usage
from reroute_jax.engine.batching import Layout
from reroute_jax.engine.sampling import Sampling
from reroute_jax.errors import RerouteError


@dataclass(frozen=True)
class News:
    """tokens, logprobs: of the answer, since the last news; without the id that ends it. usage: with what was chosen so
    far. finish_reason: "stop" or "length", in the last news of an answer. error: why there is no more of it."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    usage: Usage | None = None
    finish_reason: str | None = None
    error: RerouteError | None = None

    @property
    def last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass(eq=False)
class Request:
    """One answer. layout: under the schedule of the pool that it goes to. number: of the answer among those of one
    question, which its draws depend on. tell: gets all news, on the engine's thread, and must be quick.

    cancelled: anyone may set it; the request then gives its place to another.
    """

    layout: Layout
    sampling: Sampling
    number: int
    tell: Callable[[News], object]
    cancelled: bool = False
