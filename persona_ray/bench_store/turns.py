"""Contestants that take turns, and what their turns took, beside each other."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Took:
    """One turn of one contestant."""

    num_bytes: float
    wall_s: float
    cpu_s: float
    """Of all threads of this process; a server is another one."""

    @property
    def mb_per_s(self) -> float:
        """Encoded."""
        return self.num_bytes / 1e6 / self.wall_s

    @property
    def cpu_s_per_gb(self) -> float:
        """Encoded."""
        return self.cpu_s / (self.num_bytes / 1e9)


def timed(num_bytes: float, work: Callable[[], object]) -> Took:
    """What `work` takes to move `num_bytes`."""
    gc.collect()
    began_s, cpu_began_s = time.perf_counter(), time.process_time()
    work()
    return Took(num_bytes, time.perf_counter() - began_s, time.process_time() - cpu_began_s)


def in_turns(num_pairs: int, contestants: Mapping[str, Callable[[int], Took]]) -> dict[str, list[Took]]:
    """Each contestant's turns: one after the other, and every second time the other way round."""
    took: dict[str, list[Took]] = {name: [] for name in contestants}
    for turn in range(num_pairs):
        for name in list(contestants)[:: 1 if turn % 2 == 0 else -1]:
            took[name].append(contestants[name](turn))
    return took


def compared(ours: Sequence[Took], bare: Sequence[Took]) -> dict[str, Any]:
    """Medians, as plain JSON values."""
    ratios = [one.mb_per_s / other.mb_per_s for one, other in zip(ours, bare, strict=True)]
    return {
        "over_bare": median(ratios),
        "pairs": ratios,
        "mb_per_s": median(one.mb_per_s for one in ours),
        "bare_mb_per_s": median(one.mb_per_s for one in bare),
        "cpu_s_per_gb": median(one.cpu_s_per_gb for one in ours),
        "bare_cpu_s_per_gb": median(one.cpu_s_per_gb for one in bare),
    }
