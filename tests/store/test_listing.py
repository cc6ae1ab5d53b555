from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from persona_ray.errors import InputError
from persona_ray.report.stores import listing_json, listing_table
from persona_ray.spec import RowKey
from persona_ray.store import listing
from persona_ray.store.backend import Backend
from persona_ray.store.folder import FolderBackend
from persona_ray.store.listing import list_stores
from persona_ray.store.plan_file import PlanFile, plan_key
from persona_ray.store.plans import read_plans


def rendered(table: RenderableType) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_every_store_below_is_a_line(tmp_path: Path, toy: Any, make_toy: Any) -> None:
    toy.fill(tmp_path / "b", units=range(2))
    make_toy(rows=3, layers=(0, 1, 2)).prepare(tmp_path / "deep/down/a")
    (tmp_path / "else/where").mkdir(parents=True)
    toy.fill(tmp_path / ".hidden/c")
    told: list[int] = []
    one, other = list_stores(str(tmp_path), progress=told.append)
    assert (one.url, other.url) == (str(tmp_path / "b"), str(tmp_path / "deep/down/a"))
    assert told == [1, 1]
    assert one.summary is not None
    assert (one.summary.name, one.summary.model_id, one.summary.model_revision) == ("toy", "toy/model", None)
    assert (one.summary.rows, one.summary.units, one.summary.committed) == (10, 3, (2,))
    assert (one.summary.layers, one.summary.hidden_size) == ((0, 3), 6)
    assert one.summary.last_commit is not None
    assert one.summary.last_commit >= one.summary.created
    assert other.summary is not None
    assert (other.summary.committed, other.summary.last_commit, other.summary.layers) == ((0,), None, (0, 1, 2))
    assert list_stores(str(tmp_path / "b")) == [one]


def test_it_looks_as_deep_as_it_is_told(tmp_path: Path, toy: Any) -> None:
    toy.prepare(tmp_path / "1/2/3")
    assert len(list_stores(str(tmp_path), max_depth=3)) == 1
    assert list_stores(str(tmp_path), max_depth=2) == []


def break_root(store: Path) -> None:
    (store / "zarr.json").write_text("{")


def break_attributes(store: Path) -> None:
    (store / "zarr.json").write_text('{"attributes": {"schema_version": 1, "plans": 1, "layer_sets": [[0, 3]]}}')


def remove_root(store: Path) -> None:
    (store / "zarr.json").unlink()


def remove_plan(store: Path) -> None:
    (store / "_plans/000000.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (break_root, "cannot be read"),
        (break_attributes, "identity"),
        (remove_root, "creation was interrupted"),
        (remove_plan, "000000.json"),
    ],
)
def test_a_broken_store_is_a_line_with_its_reason(tmp_path: Path, toy: Any, spoil: Any, words: str) -> None:
    for name in "abc":
        toy.fill(tmp_path / name)
    spoil(tmp_path / "b")
    found = list_stores(str(tmp_path))
    assert [line.summary is None for line in found] == [False, True, False]
    assert found[1].problem is not None
    assert words in found[1].problem
    assert words in rendered(listing_table(found)).replace("\n", " ")
    assert [line["problem"] is None for line in listing_json(str(tmp_path), found)["stores"]] == [True, False, True]


def test_a_plan_that_the_root_does_not_know_yet_is_counted(tmp_path: Path, toy: Any) -> None:
    toy.fill(tmp_path)
    plans = read_plans(FolderBackend(tmp_path))
    more = PlanFile.new(
        identity=toy.identity(),
        plan=toy.plan.__class__(toy.archetypes, toy.archetypes[:1], (RowKey("bard", 7, 7),), toy.unit_rows, first_unit=3),
        job={},
        chunk_units=plans.chunk_units,
    )
    FolderBackend(tmp_path).create_once(plan_key(1), more.to_bytes())
    (line,) = list_stores(str(tmp_path))
    assert line.summary is not None
    assert (line.summary.rows, line.summary.units, line.summary.committed) == (11, 4, (3,))


def test_requests_do_not_grow_with_units(tmp_path: Path, make_toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Counted(FolderBackend):
        def get_or_none(self, key: str) -> bytes | None:
            asked.append(f"get {key}")
            return super().get_or_none(key)

        def list_keys(self, folder: str) -> list[str]:
            asked.append(f"keys {folder}")
            return super().list_keys(folder)

        def list_folders(self, folder: str) -> list[str]:
            asked.append(f"folders {folder}")
            return super().list_folders(folder)

    def opened(url: str, *, is_hasty: bool = False) -> Backend:
        assert is_hasty
        return Counted(Path(url))

    monkeypatch.setattr(listing, "open_backend", opened)
    make_toy(rows=40, unit_rows=2).fill(tmp_path / "a")
    (line,) = list_stores(str(tmp_path))
    assert line.summary is not None
    assert line.summary.committed == (20,)
    # A folder's listing of dates is made from its listing of keys.
    assert sorted(asked) == sorted(["folders ", "folders a", "keys _layers", "keys _plans", "get zarr.json", "keys _commits"])


def test_what_is_no_folder_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        list_stores(str(tmp_path / "nowhere"))
    assert list_stores(str(tmp_path)) == []
    assert "no stores" in rendered(listing_table([]))
