"""What a store asks its backend for, counted while it works."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from unittest.mock import patch

from persona_ray.store.backend import Backend

T = TypeVar("T")

REQUESTS = ("create_once", "get_or_none", "part_or_none", "list_keys", "list_folders", "list_objects", "delete", "_replace")


class Requests:
    """What backends of one class are asked for while it listens; without faults a call is one request."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.keys: list[str] = []
        """Of reads."""
        self.most_at_once = 0
        self._under_way = 0
        self._lock = threading.Lock()

    def per_unit(self, num_units: int) -> dict[str, float]:
        """Kind of request -> how many."""
        return {name: count / num_units for name, count in sorted(self.counts.items())}

    @contextmanager
    def heard(self, kind: type[Backend]) -> Iterator[None]:
        """Listens to backends of class `kind`."""
        with ExitStack() as stack:
            for name in REQUESTS:
                stack.enter_context(patch.object(kind, name, self._heard(name, getattr(kind, name))))
            yield

    def _heard(self, name: str, method: Callable[..., T]) -> Callable[..., T]:
        def call(backend: Backend, key: str, *rest: Any) -> T:
            with self._lock:
                self.counts[name.strip("_")] += 1
                self.keys += [key] if name == "get_or_none" else []
                self._under_way += 1
                self.most_at_once = max(self.most_at_once, self._under_way)
            try:
                return method(backend, key, *rest)
            finally:
                with self._lock:
                    self._under_way -= 1

        return call
