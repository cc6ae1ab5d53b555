from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import zarr

from persona_ray.store.finish import finish_store

Tree = Callable[[Path], dict[str, bytes]]


def test_missing_committed_chunks_are_added(tmp_path: Path, toy: Any, tree: Tree) -> None:
    url = toy.fill(tmp_path)
    whole = tree(tmp_path)
    for unit in (0, 2):
        (tmp_path / f"committed/c/{unit}").unlink()
    (tmp_path / "_commits/000000.json").unlink()
    finish_store(url)
    assert zarr.open_group(tmp_path, mode="r")["committed"][:].tolist() == [0] * 4 + [1] * 6 + [0] * 2
    assert tree(tmp_path) == {key: data for key, data in whole.items() if key not in {"committed/c/0", "_commits/000000.json"}}


def test_consolidated_metadata_are_mended_and_then_left_alone(tmp_path: Path, toy: Any) -> None:
    url = toy.fill(tmp_path)
    group = zarr.open_group(tmp_path, mode="a")
    group.create_group("extra").create_array("thing", shape=(5,), dtype="int8")
    finish_store(url)
    root = zarr.open_group(tmp_path, mode="r", use_consolidated=True)
    assert root["extra/thing"].shape == (5,)
    assert root["activations"].shape == (12, 2, 6)
    before = (tmp_path / "zarr.json").stat().st_mtime_ns
    finish_store(url)
    assert (tmp_path / "zarr.json").stat().st_mtime_ns == before
