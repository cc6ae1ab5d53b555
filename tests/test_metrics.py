"""Recording is heard by whoever listens, and by nobody else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from persona_ray.errors import InputError
from persona_ray.metrics import METRICS, ROWS, STORE_BYTES, STORE_REQUESTS, STORE_SECONDS, UNITS_LEFT, Kind, record, recorded_by
from persona_ray.store.folder import FolderBackend
from tests.recording import Records


def fail_after(act: Callable[[], None]) -> None:
    act()
    raise KeyError


def test_records_go_to_the_innermost_listener_and_to_nobody_afterwards() -> None:
    outer, inner = Records(), Records()
    record(UNITS_LEFT, 1)
    with recorded_by(outer):
        record(UNITS_LEFT, 2)
        with pytest.raises(KeyError), recorded_by(inner):
            fail_after(lambda: record(ROWS, 3, outcome="stored"))
        record(UNITS_LEFT, 4)
    record(UNITS_LEFT, 5)
    assert outer.of(UNITS_LEFT) == [2, 4]
    assert inner.of(ROWS, outcome="stored") == [3]
    assert not outer.of(ROWS)


def test_a_store_counts_its_requests(tmp_path: Path) -> None:
    backend, records = FolderBackend(tmp_path / "store"), Records()
    with recorded_by(records):
        backend.create_once("a/b", b"12345")
        backend.create_once("a/b", b"123456789")
        assert backend.get("a/b") == b"12345"
        assert backend.get_part("a/b", 1, 3) == b"23"
        assert backend.get_or_none("a/c") is None
        assert backend.list_keys("a") == ["a/b"]
        assert len(backend.list_objects("a")) == 1
        (tmp_path / "store" / "a" / "file").write_text("")
        with pytest.raises(InputError):
            backend.create_once("a/file/c", b"1")
    assert records.of(STORE_REQUESTS, operation="create") == [1, 1]
    assert records.of(STORE_BYTES, operation="create") == [5, 9]
    assert records.of(STORE_BYTES, operation="read") == [5, 2, 0]
    assert records.of(STORE_REQUESTS, operation="list") == [1, 1]
    assert min(records.of(STORE_SECONDS)) > 0


def test_every_metric_says_what_it_is() -> None:
    for metric in METRICS:
        assert metric.description
        assert (metric.kind is Kind.HISTOGRAM) == bool(metric.bounds)
