"""Work on the next items while one is being used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(read: Callable[[Item], Result], items: Iterable[Item], depth: int) -> Iterator[Result]:
    """`read(item)` for every item, in order; up to `depth` results are ready or under way while the consumer has one.

    What `read` raises is raised in its place; whoever stops early waits for what is under way, and no more is begun.
    """
    waiting = iter(items)
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(depth) as pool:
        try:
            for item in waiting:
                pending.append(pool.submit(read, item))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
