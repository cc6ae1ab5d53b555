"""Values that several threads need again and again: each is read once while it is kept, by whoever needs it first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock
from typing import Generic, TypeVar

Value = TypeVar("Value")


class ReadOnce(Generic[Value]):
    """The `capacity` values that were used last, by number, as `read(number)` gives them."""

    def __init__(self, read: Callable[[int], Value], capacity: int) -> None:
        self._read, self._capacity, self._lock = read, capacity, Lock()
        self._found: OrderedDict[int, Future[Value]] = OrderedDict()

    def get(self, number: int) -> Value:
        """Reads, waits for the one who is reading it, or answers what is there. Raises what `read` raised."""
        with self._lock:
            found = self._found.get(number)
            is_first = found is None
            if found is None:
                found = self._found[number] = Future()
            self._found.move_to_end(number)
            while len(self._found) > self._capacity:
                self._found.popitem(last=False)
        if is_first:
            try:
                found.set_result(self._read(number))
            except BaseException as error:  # whoever waits for it gets it as well
                found.set_exception(error)
                raise
        return found.result()
