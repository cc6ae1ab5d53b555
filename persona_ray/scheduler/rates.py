"""How long work takes here, learned from what was done."""

from __future__ import annotations

from collections import deque
from statistics import median

from persona_ray.scheduler.events import Kind

REMEMBERED = 65
"""Of each kind, the last so many."""


class Rates:
    """Seconds for a token of expected work, by kind of task: a median, so that a straggler does not move it."""

    def __init__(self) -> None:
        self._seen: dict[Kind, deque[float]] = {kind: deque(maxlen=REMEMBERED) for kind in Kind}
        self._median: dict[Kind, float] = {}

    def learn(self, kind: Kind, work: float, seconds: float) -> None:
        """A task of that much work took so long."""
        seen = self._seen[kind]
        seen.append(seconds / max(work, 1e-9))
        self._median[kind] = median(seen)

    def expected_s(self, kind: Kind, work: float) -> float | None:
        """Seconds; of a kind that was never done, what a whole unit's share would take; None before the first one."""
        rate = self._median.get(kind, self._median.get(Kind.WHOLE))
        return None if rate is None else rate * work
