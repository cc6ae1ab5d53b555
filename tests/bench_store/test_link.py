from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from persona_ray.bench_store.link import link
from persona_ray.store.folder import FolderBackend


def test_the_link_is_shared_and_changes_nothing_else(tmp_path: Path) -> None:
    """20 objects of 10 kB there and back, at 2 MB/s: never sooner than 0.2 s, however many are at it."""
    backend = FolderBackend(tmp_path)
    with link(FolderBackend, 2.0), ThreadPoolExecutor(10) as threads:
        begin_s = time.monotonic()
        assert all(
            made.is_ours for made in threads.map(lambda number: backend.create_once(str(number), bytes([number]) * 10_000), range(20))
        )
        assert list(threads.map(backend.get, map(str, range(20)))) == [bytes([number]) * 10_000 for number in range(20)]
        assert time.monotonic() - begin_s >= 0.2
    assert backend.get_part("3", 5, 7) == b"\x03\x03"
    assert backend.get_or_none("none") is None
