"""The thread that owns the device: who enters next, and segment after segment of all that runs."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue

from reroute_jax.errors import RerouteError
from reroute_jax.serving.pool import Pool
from reroute_jax.serving.requests import News, Request

log = logging.getLogger("reroute_jax")

_STOPPING = "the server stops: ask another one, or later"


class Busy(RerouteError):
    """As many requests wait as may."""


class Stopping(RerouteError):
    """The engine has ended, or is about to."""


class Engine:
    """Answers requests in slots of its pools, on a thread of its own.

    In turn: prefills for those that have waited longest among those with a free slot, of up to `token_budget` slots at
    the decoder's input together, and one segment in every pool. So answers are begun in the order of their requests,
    but for those whose pool is full; and what runs never waits for more than so many slots of prefill and the other
    pools' segments.
    """

    def __init__(self, pools: Sequence[Pool], token_budget: int, most_waiting: int) -> None:
        self.pools, self.token_budget, self.most_waiting = tuple(pools), token_budget, most_waiting
        self._inbox: SimpleQueue[tuple[Pool, Request] | None] = SimpleQueue()
        self._queues = {pool: deque[tuple[int, Request]]() for pool in self.pools}
        self._arrivals, self._waiting, self._ended, self._lock = 0, 0, False, threading.Lock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Places that are taken: of requests without a slot yet, and of those that will be submitted."""
        return self._waiting

    @property
    def running(self) -> int:
        return sum(len(pool.running) for pool in self.pools)

    def take_places(self, count: int) -> None:
        """Before requests are submitted, so that nothing is made ready that cannot wait. Raises Busy where there are
        not as many left."""
        with self._lock:
            if self._waiting + count > self.most_waiting:
                raise Busy(f"{self._waiting} requests wait and {self.most_waiting} may: try again later")
            self._waiting += count

    def give_places(self, count: int) -> None:
        """Of requests that will not be submitted."""
        with self._lock:
            self._waiting -= count

    def submit(self, pool: Pool, requests: Sequence[Request]) -> None:
        """Requests that have places. Raises Stopping where the thread has ended."""
        with self._lock:
            if self._ended:
                raise Stopping(_STOPPING)
            for request in requests:
                self._inbox.put((pool, request))

    def close(self) -> None:
        """End the thread; what still waits or runs is told so."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._receive():
                self._drop_cancelled()
                self._enter()
                for pool in self.pools:
                    if pool.running:
                        self._guarded(pool, pool.advance)
        finally:
            self._end()

    def _receive(self) -> bool:
        """Take in what was submitted, waiting where there is nothing else to do. False where the thread is to end."""
        while not self._inbox.empty() or not (self.running or any(self._queues.values())):
            item = self._inbox.get()
            if item is None:
                return False
            pool, request = item
            self._queues[pool].append((self._arrivals, request))
            self._arrivals += 1
        return True

    def _drop_cancelled(self) -> None:
        for pool, queue in self._queues.items():
            pool.leave_cancelled()
            kept = [one for one in queue if not one[1].cancelled]
            self.give_places(len(queue) - len(kept))
            self._queues[pool] = deque(kept)

    def _enter(self) -> None:
        """The oldest first, as far as the token budget goes."""
        left = self.token_budget
        while able := [pool for pool, queue in self._queues.items() if pool.joining(len(queue))]:
            pool = min(able, key=lambda one: self._queues[one][0][0])
            queue = self._queues[pool]
            count = pool.joining(len(queue))
            left -= count * pool.shape.slots
            if left < 0:
                return
            requests = [queue.popleft()[1] for _ in range(count)]
            self.give_places(count)
            self._guarded(pool, partial(pool.enter, requests), requests)

    def _guarded(self, pool: Pool, work: Callable[[], None], entering: Sequence[Request] = ()) -> None:
        """Whatever goes wrong in a pool ends what runs there, and nothing else."""
        try:
            work()
        except Exception as problem:
            log.exception("a program failed")
            pool.fail(RerouteError(f"the device failed on this question ({type(problem).__name__})"), entering)

    def _end(self) -> None:
        """Tell all that run or wait."""
        with self._lock:
            self._ended = True
        while not self._inbox.empty():
            if (item := self._inbox.get()) is not None:
                self._queues[item[0]].append((self._arrivals, item[1]))
        waiting = [request for queue in self._queues.values() for _, request in queue]
        running = [row.request for pool in self.pools for row in pool.rows if row is not None]
        for request in (*running, *waiting):
            request.tell(News(error=Stopping(_STOPPING)))
