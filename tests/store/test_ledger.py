from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from persona_ray.errors import IntegrityError
from persona_ray.store.ledger import Ledger
from persona_ray.store.marker import Marker, ObjectRecord, marker_key, place_of_marker_key
from persona_ray.store.reader import open_store
from persona_ray.store.snapshot import Snapshot


def test_a_unit_exists_when_its_marker_does(tmp_path: Path, toy: Any) -> None:
    toy.fill(tmp_path, units=range(1))
    ledger = Ledger(str(tmp_path))
    assert ledger.committed() == {0}
    assert ledger.marker(2) is None
    toy.fill(tmp_path, units=range(2, 3))
    assert ledger.committed() == {0, 2}
    assert list(ledger.markers()) == [0, 2]
    assert ledger.marker(2) == ledger.markers()[2]
    (tmp_path / "_commits/000000.json").unlink()
    assert ledger.committed() == {2}
    assert list(ledger.markers()) == [2]


def test_counts_add_up_and_padding_is_not_counted(tmp_path: Path, toy: Any) -> None:
    toy.fill(tmp_path, refused={0: "empty answer", 5: "empty answer", 9: "too long"})
    counts = Ledger(str(tmp_path)).counts()
    assert (counts.asked, counts.stored, counts.refused) == (10, 7, 3)
    assert counts.reasons == {"empty answer": 2, "too long": 1}


def test_the_digest_names_the_committed_state(tmp_path: Path, toy: Any) -> None:
    toy.prepare(tmp_path)
    store = open_store(str(tmp_path))
    digests = [store.snapshot().digest]
    for unit in toy.plan.units:
        toy.fill(tmp_path, units=range(unit, unit + 1))
        digests.append(store.snapshot().digest)
    assert len(set(digests)) == 4
    assert open_store(str(tmp_path)).snapshot().digest == digests[-1]
    assert pickle.loads(pickle.dumps(store)).snapshot().digest == digests[-1]


def test_the_digest_does_not_depend_on_the_order_of_commits() -> None:
    assert Snapshot.of([{1: b"x", 0: b"y"}]).digest == Snapshot.of([{0: b"y", 1: b"x"}]).digest
    assert Snapshot.of([{0: b"x", 1: b"y"}]).digest != Snapshot.of([{1: b"x", 0: b"y"}]).digest


def test_markers_survive_json() -> None:
    marker = Marker(
        unit=7,
        first_row=28,
        num_rows=4,
        objects={"a/c/7": ObjectRecord(3, "ab")},
        refused={30: 'an "odd" reason'},
        made={"seconds": 1.5, "notes": ["halved"]},
        created="2026-11-23T00:00:00+00:00",
    )
    assert Marker.from_bytes(marker.to_bytes(), "here") == marker
    assert (marker.num_stored, marker.num_bytes) == (3, 3)


def test_a_damaged_marker_is_named(tmp_path: Path, toy: Any) -> None:
    toy.fill(tmp_path, units=range(1))
    (tmp_path / "_commits/000000.json").write_text('{"unit": 0}')
    with pytest.raises(IntegrityError, match=r"_commits/000000\.json: damaged"):
        Ledger(str(tmp_path)).markers()


@pytest.mark.parametrize("unit", [0, 999_999, 1_000_000])
def test_marker_keys(unit: int) -> None:
    for layer_set in (0, 1, 12):
        assert place_of_marker_key(marker_key(unit, layer_set)) == (layer_set, unit)
    assert place_of_marker_key(f"{marker_key(unit)}.tmp") is None
