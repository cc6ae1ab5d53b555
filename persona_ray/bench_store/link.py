"""A link of so many bytes a second before a place: what the ratios are where the network, and not the processor, is what is short."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from persona_ray.store.backend import Backend


@contextmanager
def link(kind: type[Backend], mb_per_s: float) -> Iterator[None]:
    """All backends of class `kind` share it: the bytes of an object take their time, after those of whoever came before."""
    lock, free_s = threading.Lock(), 0.0

    def carry(num_bytes: int) -> None:
        nonlocal free_s
        with lock:
            now_s = time.monotonic()
            free_s = max(now_s, free_s) + num_bytes / 1e6 / mb_per_s
            wait_s = free_s - now_s
        time.sleep(wait_s)

    def put(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(backend: Backend, key: str, data: bytes) -> Any:
            carry(len(data))
            return method(backend, key, data)

        return call

    def get(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(backend: Backend, key: str, *part: Any) -> Any:
            data = method(backend, key, *part)
            carry(len(data or b""))
            return data

        return call

    with ExitStack() as stack:
        for names, linked in ((("create_once", "_replace"), put), (("get_or_none", "part_or_none"), get)):
            for name in names:
                stack.enter_context(patch.object(kind, name, linked(getattr(kind, name))))
        yield
