"""Ctrl-C and SIGTERM: what is under way is finished first, unless somebody asks twice."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruptions:
    """While the `with` block lasts, either signal raises KeyboardInterrupt; within `drained`, only the second one does."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """The signal that asked for the end."""
        self._drains = False
        self._before: dict[signal.Signals, Any] = {}

    @contextmanager
    def drained(self) -> Iterator[Self]:
        """For work that looks at `reason` and ends by itself. Raises KeyboardInterrupt afterwards, if it was asked to."""
        self._drains = True
        try:
            yield self
        finally:
            self._drains = False
        if self.reason is not None:
            raise KeyboardInterrupt(self.reason)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other one may listen to signals
            self._before = {number: signal.signal(number, self._heard) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, _frame: FrameType | None) -> None:
        if not self._drains or self.reason is not None:
            raise KeyboardInterrupt(signal.Signals(number).name)
        self.reason = f"{signal.Signals(number).name} received (once more ends the run at once)"
