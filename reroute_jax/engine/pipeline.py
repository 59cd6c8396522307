"""Batches of prompts that arrive in any order: filled by shape, and made ready while others run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def full_groups(
    items: Iterable[Item], key: Callable[[Item], Hashable], limit: Callable[[Hashable], int]
) -> Iterator[tuple[Hashable, list[Item]]]:
    """Each key with items of it, `limit(key)` of them at a time; what is left at the end comes last, in fewer.

    No more than `limit(key) - 1` items of each key wait at any time.
    """
    waiting: dict[Hashable, list[Item]] = {}
    for item in items:
        group = waiting.setdefault(its_key := key(item), [])
        group.append(item)
        if len(group) == limit(its_key):
            yield its_key, waiting.pop(its_key)
    yield from waiting.items()


def ahead(items: Iterator[Item], depth: int) -> Iterator[Item]:
    """The same items, up to `depth` of them made in a background thread before they are asked for.

    An error comes where its item would. Closing waits for the item in the making, and no other is begun.
    """
    pool, end = ThreadPoolExecutor(1, "ahead"), object()
    try:
        made: list[Future] = [pool.submit(next, items, end) for _ in range(depth)]
        while (item := made.pop(0).result()) is not end:
            made.append(pool.submit(next, items, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
