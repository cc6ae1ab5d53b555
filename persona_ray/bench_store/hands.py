"""Jobs for several hands at once: each has a thread, and a client or a writer of its own."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Job = TypeVar("Job")
Hand = TypeVar("Hand")


def share_out(jobs: Iterable[Job], hands: Sequence[Hand], do: Callable[[Hand, Job], object]) -> None:
    """Every job by the next hand that is free; one thread for each hand."""
    left: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        left.put(job)

    def work(hand: Hand) -> None:
        while True:
            try:
                job = left.get_nowait()
            except queue.Empty:
                return
            do(hand, job)

    with ThreadPoolExecutor(len(hands)) as threads:
        for done in [threads.submit(work, hand) for hand in hands]:
            done.result()
