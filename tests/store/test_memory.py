"""A store in this process's memory: the whole protocol, and nothing of it anywhere else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import zarr

from persona_ray.errors import InputError
from persona_ray.store.address import open_backend
from persona_ray.store.cloud import _in_memory
from persona_ray.store.reader import open_store
from persona_ray.store.verify import verify

URL = "memory://test/store"


@pytest.fixture
def url() -> Iterator[str]:
    yield URL
    _in_memory.pop(URL, None)


def test_it_is_written_read_and_verified_like_any_other(url: str, toy: Any) -> None:
    toy.fill(url, refused={3: "empty"})
    store = open_store(url)
    assert verify(url).is_right
    assert (store.ledger.counts().stored, store.ledger.counts().refused) == (9, 1)
    rows = np.concatenate([rows.activations_RLD for rows in store.scored_rows(range(3), None)])
    assert rows.shape == (9, 2, 6)
    group = zarr.open_group(open_backend(url).zarr_store(), mode="r")
    np.testing.assert_array_equal(group["activations"][:][group["status"][:] == 0], rows)


def test_the_first_writer_wins_and_another_url_is_another_place(url: str) -> None:
    assert open_backend(url).create_once("a/b", b"one").is_ours
    assert not open_backend(f"{url}/").create_once("a/b", b"two").is_ours
    assert open_backend(url).get("a/b") == b"one"
    open_backend(url).probe_write_once()
    assert open_backend("memory://test/other").get_or_none("a/b") is None


def test_another_process_finds_nothing(url: str, toy: Any) -> None:
    toy.fill(url)
    code = f"from persona_ray.store.reader import open_store\nopen_store({url!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert InputError.__name__ in done.stderr
    assert "no persona_ray store here" in done.stderr
