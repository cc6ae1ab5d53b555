"""Rows as an Icechunk repository, read by icechunk with zarr and with xarray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from persona_ray.errors import InputError
from persona_ray.store.exchange.icechunk import export_icechunk
from persona_ray.store.reader import StoreReader

from .conftest import LEFT_OUT, without_us

OPEN = """
import icechunk
repository = icechunk.Repository.open(icechunk.local_filesystem_storage(sys.argv[1]))
session = repository.readonly_session("main")
answer = {"commits": [commit.message for commit in repository.ancestry(branch="main")]}
"""
WITH_ZARR = """
import zarr
group = zarr.open_group(session.store, mode="r")
answer["attributes"] = dict(group.attrs)
answer["arrays"] = {name: array[...].tolist() for name, array in group.arrays()}
answer["dims"] = {name: array.metadata.dimension_names for name, array in group.arrays()}
answer["names"] = group["archetype"].attrs["flag_meanings"].split()
answer["score"] = group[f"scores/{group.attrs['judge']}/score"][...].tolist()
"""
WITH_XARRAY = """
import xarray
dataset = xarray.open_zarr(session.store, consolidated=False, chunks=None)
answer["attributes"] = dict(dataset.attrs)
answer["arrays"] = {name: dataset[name].values.tolist() for name in dataset.variables}
answer["dims"] = {name: list(dataset[name].dims) for name in dataset.variables}
answer["names"] = dataset["archetype"].attrs["flag_meanings"].split()
scores = xarray.open_zarr(session.store, group=f"scores/{dataset.attrs['judge']}", consolidated=False, chunks=None)
answer["score"] = scores["score"].values.tolist()
"""


def check(found: Any, expected: dict, store: StoreReader) -> None:
    arrays, rows = found["arrays"], sorted(expected)
    assert arrays["rollout"] == rows
    assert arrays["layer"] == list(store.layers)
    assert found["dims"]["activations"] == ["rollout", "layer", "hidden"]
    np.testing.assert_array_equal(np.array(arrays["activations"], np.float32), np.stack([expected[row][2] for row in rows]))
    keys = [expected[row][0].key for row in rows]
    assert [found["names"][code] for code in arrays["archetype"]] == [key.archetype for key in keys]
    for name in ("system_prompt", "question", "sample", "turn"):
        assert arrays[name] == [getattr(key, name) for key in keys]
    assert arrays["finish_reason"] == [int(expected[row][0].finish_reason) for row in rows]
    assert found["score"] == [expected[row][1] for row in rows]
    assert found["attributes"]["ledger_digest"] == store.snapshot().digest
    assert len(found["commits"]) == 2, "the repository's own first one, and ours"
    assert store.snapshot().digest in found["commits"][0]


@pytest.mark.parametrize("reader", [WITH_ZARR, WITH_XARRAY], ids=["zarr", "xarray"])
def test_others_read_every_row(store: StoreReader, expected: dict, tmp_path: Path, reader: str) -> None:
    units: list[int] = []
    done = export_icechunk(store, tmp_path / "out", progress=units.append)
    assert (done.rows, done.left_out) == (len(expected), LEFT_OUT)
    assert sum(units) == len(store.ledger.committed())
    check(without_us(OPEN + reader, tmp_path / "out"), expected, store)


def test_some_layers(store: StoreReader, expected: dict, tmp_path: Path) -> None:
    export_icechunk(store, tmp_path / "out", layers=[3])
    arrays = without_us(OPEN + WITH_ZARR, tmp_path / "out")["arrays"]
    assert arrays["layer"] == [3]
    np.testing.assert_array_equal(np.array(arrays["activations"], np.float32), np.stack([expected[row][2][1:] for row in sorted(expected)]))


def test_what_cannot_be_exported(store: StoreReader, empty_store: StoreReader, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="layer 7 was not captured"):
        export_icechunk(store, tmp_path / "out", layers=[7])
    with pytest.raises(InputError, match="nothing to export"):
        export_icechunk(empty_store, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
