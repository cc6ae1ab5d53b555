"""Tasks that wait, and which of them is next.

Units come in the balanced order of their plan. The next one is drawn within a window of that order, so that any prefix of the work is
balanced but for the window: at random, so that two drivers on one store seldom draw the same; the longest first, where the
end is near and nobody else is there. What failed before comes first, when its pause is over, and on another replica if there is one.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import count

from persona_ray.scheduler.events import Task

SPAN = 4
"""How many windows the oldest unit of the window may lie behind the newest."""


class Waiting:
    """The tasks of a run that nobody holds."""

    def __init__(self, units: Iterable[int], *, window: int, seed: int) -> None:
        self._later = deque(enumerate(units))
        """(Place in the work order, unit), never drawn so far."""
        self._window: list[tuple[int, int]] = []
        self._places: list[int] = []
        """Heap of the places in the window, and of some that have left it."""
        self._drawn: set[int] = set()
        self._size = window
        self._not_drawn = {unit for _, unit in self._later}
        self._gone: set[int] = set()
        """Units of `_later` that are not wanted any more."""
        self.first: deque[Task] = deque()
        """Those that come first, in order."""
        self._paused: list[tuple[float, int, Task]] = []
        """Heap by the end of the pause."""
        self._tickets = count()
        self._dice = random.Random(seed)  # noqa: S311  # no secret, a draw

    def __iter__(self) -> Iterator[Task]:
        """All of them, in no particular order."""
        yield from self.first
        yield from (task for _, _, task in self._paused)
        yield from (Task(unit) for _, unit in self._window)
        yield from (Task(unit) for _, unit in self._later if unit not in self._gone)

    @property
    def num_fresh(self) -> int:
        """Units that were never tried."""
        return len(self._window) + len(self._later) - len(self._gone)

    def put(self, task: Task, *, not_before_s: float | None = None) -> None:
        """Among those that come first; after its pause, if there is one."""
        if not_before_s is None:
            self.first.append(task)
        else:
            heapq.heappush(self._paused, (not_before_s, next(self._tickets), task))

    def end_pauses(self, now_s: float) -> None:
        """Those whose pause is over come first from now on."""
        while self._paused and self._paused[0][0] <= now_s:
            self.first.append(heapq.heappop(self._paused)[2])

    def take_first(self, suits: Callable[[Task], bool]) -> Task | None:
        """The first of those that come first for which `suits` holds."""
        for place, task in enumerate(self.first):
            if suits(task):
                del self.first[place]
                return task
        return None

    def take_fresh(self, work: Callable[[int], float] | None) -> Task | None:
        """A unit of the window: the one of most `work`, or (None) any."""
        self._fill()
        if not self._window:
            return None
        if work is None:
            chosen = self._dice.randrange(len(self._window))
        else:
            chosen = max(range(len(self._window)), key=lambda i: (work(self._window[i][1]), -self._window[i][0]))
        return Task(self._pop(chosen))

    def drop(self, unit: int) -> None:
        """Its tasks are not wanted any more."""
        self.first = deque(task for task in self.first if task.unit != unit)
        self._paused = [entry for entry in self._paused if entry[2].unit != unit]
        heapq.heapify(self._paused)
        for place, (_, fresh) in enumerate(self._window):
            if fresh == unit:
                self._pop(place)
                return
        if unit in self._not_drawn:
            self._gone.add(unit)

    def _pop(self, chosen: int) -> int:
        self._window[chosen], self._window[-1] = self._window[-1], self._window[chosen]
        place, unit = self._window.pop()
        self._drawn.add(place)
        return unit

    def _fill(self) -> None:
        while self._places and self._places[0] in self._drawn:
            self._drawn.remove(heapq.heappop(self._places))
        while self._later and len(self._window) < self._size:
            place, unit = self._later[0]
            if unit in self._gone:
                self._gone.remove(unit)
                self._not_drawn.remove(unit)
                self._later.popleft()
                continue
            if self._places and place - self._places[0] >= SPAN * self._size:
                return  # the oldest one is drawn soon: the window only shrinks until then
            self._later.popleft()
            self._not_drawn.remove(unit)
            self._window.append((place, unit))
            heapq.heappush(self._places, place)
