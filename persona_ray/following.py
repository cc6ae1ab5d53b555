"""Looking at something again and again, in a thread of its own, while something else is at work."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

log = logging.getLogger(__name__)


class Follower(AbstractContextManager["Follower"]):
    """Calls `look` every `every_s` seconds while the block lasts, until it answers True: seen enough. An error ends it, too."""

    def __init__(self, name: str, look: Callable[[], bool], every_s: float) -> None:
        self._look = look
        self._every_s = every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name=name, daemon=True)
        self.error: Exception | None = None

    def is_over(self) -> bool:
        """Whether the block has ended, and what is still looked at is wanted no more."""
        return self._ended.is_set()

    def _follow(self) -> None:
        try:
            while not self._ended.wait(self._every_s) and not self._look():
                pass
        except Exception as error:  # noqa: BLE001 - whoever waits for what is seen here decides what it means
            self.error = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()


class Companion(ABC):
    """Follows a run beside it while the block lasts. What fails here ends nothing: it is told when the block ends."""

    def __init__(self, name: str, every_s: float, failure: str) -> None:
        """`failure`: what is said then, with one %s for what went wrong."""
        self._follower = Follower(name, self._look, every_s)
        self._failure = failure

    @abstractmethod
    def _look(self) -> bool:
        """True: seen enough."""

    def __enter__(self) -> Self:
        self._follower.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._follower.__exit__(kind, error, trace)
        if self._follower.error is not None:
            log.warning(self._failure, self._follower.error)
