"""Requests that wait for the engine."""

import numpy as np
import pytest

from benchmarks.arrivals import serve


class Clock:
    now = 0.0

    def sleep(self, seconds):
        self.now += seconds


def test_what_waits_is_answered_together_and_latency_counts_from_arrival():
    """The engine takes 2 s whatever the batch: by hand, 0 alone, 1 to 3 together, then 4 alone after a pause."""
    clock, batches = Clock(), []

    class Model:
        def generate(self, pairs, batch_size):
            batches.append(list(pairs))
            clock.now += 2

    arrivals = np.array([1.0, 1.5, 2.0, 2.5, 2.75, 20.0])
    latencies, memory = serve(arrivals, list("abcdef"), Model(), {"batch_size": 3}, lambda: clock.now, clock.sleep)
    assert batches == [["a"], ["b", "c", "d"], ["e"], ["f"]]
    assert latencies == pytest.approx([2, 3.5, 3, 2.5, 4.25, 2])
    assert len(memory) == 10 and min(memory) > 0
