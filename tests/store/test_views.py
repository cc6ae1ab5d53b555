"""What a reader sees of a store that grows, stands half written, or is looked at as it once was."""

from __future__ import annotations

import pickle
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_ray.errors import InputError, IntegrityError
from persona_ray.spec import CapturedUnit, FinishReason, Plan, Reduced, Rollout, RowKey
from persona_ray.store.finish import finish_store
from persona_ray.store.plans import Plans
from persona_ray.store.prepare import prepare_store
from persona_ray.store.reader import StoreReader, open_store
from persona_ray.store.reduced import write_reduced
from persona_ray.store.repair import requeue
from persona_ray.store.writer import UnitWriter

OWN = ("rollouts/part-000001.parquet", "activations/c/1/0/0", "response_tokens/c/1", "finish_reason/c/1", "status/c/1", "committed/c/1")
MARKER = "_commits/000001.json"


def grow(url: str | Path, toy: Any, archetype: str = "pirate", questions: int = 6) -> Plans:
    """A further plan with an archetype of its own."""
    keys = tuple(RowKey(archetype, 0, question, turn=1) for question in range(questions))
    asked = Plan(archetypes=("default", archetype), default_archetypes=("default",), keys=keys, unit_rows=toy.unit_rows)
    return prepare_store(str(url), identity=toy.identity(), plan=asked, job={"name": archetype})


def write(url: str | Path, plans: Plans, units: Sequence[int], toy: Any) -> None:
    """Units of any plan, with values that follow from the row."""
    writer = UnitWriter(str(url))
    for unit in units:
        ids = np.arange(9, dtype=np.int32)
        pairs = zip(plans.rows(unit), plans.keys(unit), strict=True)
        texts = writer.write_rollouts(unit, tuple(Rollout(row, key, "", "?", "Aye.", ids, 2, 5, FinishReason.STOP) for row, key in pairs))
        values = [np.full((len(toy.layers), toy.hidden), text.index, dtype=np.float32) for text in texts]
        writer.commit(CapturedUnit(unit, texts, np.array(values), {}, {}))


def seen(store: StoreReader) -> dict[str, Any]:
    """Everything that a reader says of its rows."""
    rows = store.rows()
    parts = list(store.scored_rows(store.plans.units, None))
    return {
        "rows": rows.rollout_N.tolist(),
        "archetypes": rows.archetype_names,
        "columns": {name: values.tolist() for name, values in rows.columns.items()},
        "activations": rows.activations().tobytes(),
        "layer": store.layer(store.layers[-1])[1].tobytes(),
        "units": store.units(),
        "parts": [part.rollout_R.tolist() for part in parts],
        "parts' activations": b"".join(part.activations_RLD.tobytes() for part in parts),
        "texts": [text.response for text in rows.rollouts()],
        "counts": (store.counts().stored, store.counts().reasons),
        "digest": store.snapshot().digest,
    }


# ---- half written


@settings(max_examples=12, deadline=None)
@given(gone=st.sets(st.sampled_from(OWN)), refused=st.sets(st.integers(0, 9), max_size=3))
def test_a_unit_without_its_marker_is_never_seen(make_toy: Any, gone: set[str], refused: set[int]) -> None:
    """Whatever else of it is there, the committed mask included."""
    toy = make_toy()
    with tempfile.TemporaryDirectory() as folder:
        url = toy.fill(folder, refused=dict.fromkeys(refused, "no luck"))
        for key in (MARKER, *gone):
            (Path(folder) / key).unlink()
        found = seen(open_store(url))
        expected = [row for row in (0, 1, 2, 3, 8, 9) if row not in refused]
        assert found["rows"] == [row for part in found["parts"] for row in part] == expected
        assert found["units"] == (0, 2)
        assert len(found["texts"]) == found["counts"][0] == len(expected)


def test_the_mask_is_for_others_and_the_marker_decides(tmp_path: Path, toy: Any) -> None:
    url = toy.fill(tmp_path, refused={4: "no luck"})
    before = seen(open_store(url))
    shutil.rmtree(tmp_path / "committed/c")
    assert seen(open_store(url)) == before
    assert before["rows"] == [0, 1, 2, 3, 5, 6, 7, 8, 9]


def test_metadata_that_are_behind_or_gone_do_not_matter(tmp_path: Path, toy: Any) -> None:
    """A service may answer an older zarr.json, with a smaller shape, after the store has grown."""
    url = toy.fill(tmp_path)
    older = {path: path.read_bytes() for path in tmp_path.rglob("zarr.json")}
    plans = grow(url, toy)
    write(url, plans, plans.files[1].plan.units, toy)
    before = seen(open_store(url))
    assert len(before["rows"]) == 16
    assert (tmp_path / "activations/zarr.json").read_bytes() != older[tmp_path / "activations/zarr.json"]
    for path, data in older.items():
        path.write_bytes(data)
    assert seen(open_store(url)) == before
    for path in older:
        path.unlink()
    assert seen(open_store(url)) == before


# ---- a state


def test_a_state_shows_the_same_rows_for_ever(tmp_path: Path, toy: Any) -> None:
    url = toy.fill(tmp_path, units=range(2), refused={1: "empty answer"})
    digest = open_store(url).cite()
    then = seen(open_store(url))
    early = open_store(url, at=digest)
    assert seen(early) == then
    toy.fill(tmp_path)  # the unit that was missing
    plans = grow(url, toy)
    write(url, plans, plans.files[1].plan.units, toy)
    finish_store(url)
    for store in (early, open_store(url, at=digest), pickle.loads(pickle.dumps(early))):
        assert seen(store) == then
        assert store.snapshot().digest == digest
        assert store.cite() == digest
    now = open_store(url)
    assert now.rows().rollout_N.tolist()[: len(then["rows"])] == then["rows"]
    assert len(now.rows()) == len(then["rows"]) + 2 + 6
    assert now.snapshot().digest != digest
    early.refresh()
    assert seen(early) == then


def test_a_state_without_further_layers_stays_so(tmp_path: Path, toy: Any) -> None:
    url = toy.fill(tmp_path)
    digest = open_store(url).cite()
    plans = prepare_store(url, identity=toy.identity(), plan=toy.plan, job={}, layers=(1,))
    for unit in plans.units:
        texts = toy.rollouts(unit)
        UnitWriter(url, (1,)).commit(CapturedUnit(unit, texts, np.ones((len(texts), 1, toy.hidden), dtype=np.float32), {}, {}))
    assert len(open_store(url).rows([1, 3])) == 10
    early = open_store(url, at=digest)
    assert len(early.rows()) == 10
    with pytest.raises(InputError, match="layer 1 was not captured"):
        early.rows([1])
    both = open_store(url).cite()
    assert both != digest
    assert len(open_store(url, at=both).rows([1, 3])) == 10


def result(digest: str, toy: Any) -> Reduced:
    num, width, layers = len(toy.archetypes), toy.hidden, len(toy.layers)
    return Reduced(
        name="r-1",
        archetypes=toy.archetypes,
        layers=toy.layers,
        role_vector_ALD=np.zeros((num, layers, width), dtype=np.float32),
        role_count_A=np.zeros(num, dtype=np.int32),
        default_vector_LD=np.zeros((layers, width), dtype=np.float32),
        axis_LD=np.zeros((layers, width), dtype=np.float32),
        pca_components_LKD=np.zeros((layers, 1, width), dtype=np.float32),
        pca_explained_variance_LK=np.zeros((layers, 1), dtype=np.float32),
        pca_explained_variance_ratio_LK=np.zeros((layers, 1), dtype=np.float32),
        cos_pc1_axis_L=np.zeros(layers, dtype=np.float32),
        attributes={"ledger_digest": digest},
    )


def test_a_result_leads_to_the_rows_that_it_was_made_from(tmp_path: Path, toy: Any) -> None:
    """Also if the store grew while it was computed."""
    store = open_store(toy.fill(tmp_path, units=range(1)))
    snapshot, then = store.snapshot(), seen(store)
    toy.fill(tmp_path)
    write_reduced(store.url, result(snapshot.digest, toy))
    store.keep(snapshot)
    named = open_store(store.url).reduced("r-1").attributes["ledger_digest"]
    assert seen(open_store(store.url, at=named)) == then
    assert open_store(store.url).units(at=snapshot) == then["units"] == (0,)


def test_the_state_of_now_needs_not_be_kept(tmp_path: Path, toy: Any, tree: Any) -> None:
    store = open_store(toy.fill(tmp_path, units=range(2)))
    before = tree(tmp_path)
    then = seen(store)
    assert seen(open_store(store.url, at=then["digest"])) == then
    assert tree(tmp_path) == before
    toy.fill(tmp_path)
    with pytest.raises(InputError, match=f"no state {then['digest']} is kept here"):
        open_store(store.url, at=then["digest"])


def spoiled(tmp_path: Path, toy: Any) -> tuple[str, str]:
    """URL and digest of a store in which unit 1 was requeued after it was cited."""
    url = toy.fill(tmp_path)
    digest = open_store(url).cite()
    shard = tmp_path / OWN[1]
    data = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert [done.is_redone for done in requeue(url, [1])] == [True]
    return url, digest


def test_a_unit_that_was_made_again_since_is_an_error_in_words(tmp_path: Path, toy: Any) -> None:
    url, digest = spoiled(tmp_path, toy)
    UnitWriter(url).commit(toy.captured(1, seed=5))
    assert len(open_store(url).rows()) == 10
    early = open_store(url, at=digest)
    for ask in (early.rows, early.counts, lambda: list(early.scored_rows([1], None)), lambda: early.layer(0)):
        with pytest.raises(IntegrityError, match=rf"unit 000001 was made again since the state {digest[:12]}\.\.\., which is lost with it"):
            ask()
    (untouched,) = early.scored_rows([2], None)
    assert untouched.rollout_R.tolist() == [8, 9]


def test_a_unit_that_is_yet_to_be_made_again_is_missed(tmp_path: Path, toy: Any) -> None:
    url, digest = spoiled(tmp_path, toy)
    with pytest.raises(IntegrityError, match="000001"):
        open_store(url, at=digest).rows()
    assert open_store(url).rows().rollout_N.tolist() == [0, 1, 2, 3, 8, 9]


def test_a_state_that_nobody_knows_is_said_in_one_line(tmp_path: Path, toy: Any) -> None:
    url = toy.fill(tmp_path, units=range(1))
    for unknown in ("ab" * 32, "", "../_plans/000000", "0"):
        with pytest.raises(InputError, match=r"no state .* is kept here \(none is\)") as caught:
            open_store(url, at=unknown)
        assert "\n" not in str(caught.value)
    digest = open_store(url).cite()
    with pytest.raises(InputError, match=rf"no state 0 is kept here \({digest[:12]}\.\.\.\)"):
        open_store(url, at="0")
    with pytest.raises(InputError, match="no persona_ray store here"):
        open_store(str(tmp_path / "elsewhere"), at=digest)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"markers": 3}', b'{"markers": [{"x": "ab"}]}', b'{"markers": [{}]}'])
def test_a_damaged_state_is_an_error_and_never_another_state(tmp_path: Path, toy: Any, damage: bytes) -> None:
    store = open_store(toy.fill(tmp_path))
    digest = store.cite()
    view = tmp_path / f"_views/{digest}.json"
    view.unlink()
    view.write_bytes(damage)
    with pytest.raises(IntegrityError, match=f"_views/{digest}.json"):
        open_store(store.url, at=digest)


@settings(max_examples=6, deadline=None)
@given(order=st.permutations(range(5)), cited_after=st.sets(st.integers(0, 5)))
def test_any_state_of_any_growth_stays(make_toy: Any, order: list[int], cited_after: set[int]) -> None:
    """Two plans of three and two units, committed in any order."""
    toy = make_toy()
    with tempfile.TemporaryDirectory() as folder:
        url = toy.prepare(folder)
        plans = grow(url, toy)
        states = {}
        for number, place in enumerate([*order, None]):
            if number in cited_after:
                states[open_store(url).cite()] = seen(open_store(url))
            if place is not None:
                write(url, plans, [plans.units[place]], toy)
        assert len(states) == len(cited_after)
        for digest, then in states.items():
            assert seen(open_store(url, at=digest)) == then


# ---- a reader that has been open for a while


def test_an_open_reader_sees_units_as_they_are_committed(tmp_path: Path, toy: Any) -> None:
    url = toy.fill(tmp_path, units=range(1))
    store = open_store(url)
    assert (len(store.rows()), store.counts().stored) == (4, 4)
    toy.fill(tmp_path)
    assert (len(store.rows()), store.counts().stored, store.units()) == (10, 10, (0, 1, 2))
    assert seen(store) == seen(open_store(url))


def test_an_open_reader_counts_and_streams_units_of_a_plan_that_came_later(tmp_path: Path, toy: Any) -> None:
    url = toy.fill(tmp_path)
    stores = [open_store(url), open_store(url)]
    plans = grow(url, toy)
    write(url, plans, plans.files[1].plan.units, toy)
    assert stores[0].counts().stored == 16
    units = plans.files[1].plan.units
    assert [len(part.rollout_R) for part in stores[1].scored_rows(units, None)] == [4, 2]


# ---- what it costs


def test_opening_and_picking_read_plans_and_markers_alone(tmp_path: Path, toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open: two listings and a GET for each plan. `rows`: a listing for each set of layers, and a GET for each marker not seen before."""
    url = toy.fill(tmp_path, units=range(2))
    backend = type(open_store(url)._backend)
    listed, got = [], []
    list_keys, get = backend.list_keys, backend.get_or_none
    monkeypatch.setattr(backend, "list_keys", lambda self, folder: listed.append(folder) or list_keys(self, folder))
    monkeypatch.setattr(backend, "get_or_none", lambda self, key: got.append(key) or get(self, key))
    store = open_store(url)
    assert (sorted(listed), got) == (["_layers", "_plans"], ["_plans/000000.json"])
    for _ in range(2):
        store.select(archetype="bard").pick([0])
    assert listed[2:] == ["_commits", "_commits"]
    assert sorted(got[1:]) == ["_commits/000000.json", "_commits/000001.json"]
    digest = store.cite()
    listed.clear()
    open_store(url, at=digest).rows()
    assert sorted(listed) == ["_layers", "_plans"], "a state needs no listing of markers"
    assert [path.name for path in (tmp_path / "_views").iterdir()] == [f"{digest}.json"]


# ---- what reader.py and ledger.py owe


def test_an_open_reader_picks_from_a_plan_that_came_later(tmp_path: Path, toy: Any) -> None:
    url = toy.fill(tmp_path)
    store = open_store(url)
    plans = grow(url, toy)
    write(url, plans, plans.files[1].plan.units, toy)
    rows = store.rows()
    assert len(rows) == 16
    assert rows.archetype_names[-6:] == ["pirate"] * 6
    assert len(store.select(archetype="pirate")) == 6
    assert seen(store) == seen(open_store(url))


def test_a_unit_of_a_state_that_is_yet_to_be_made_again_is_never_left_out(tmp_path: Path, toy: Any) -> None:
    url, digest = spoiled(tmp_path, toy)
    early = open_store(url, at=digest)
    for ask in (early.rows, early.counts, lambda: list(early.scored_rows([1], None)), lambda: early.layer(0)):
        with pytest.raises(IntegrityError, match=rf"unit 000001 was requeued since the state {digest[:12]}\.\.\., which is lost with it"):
            ask()


def test_a_state_names_the_layers_that_it_has(tmp_path: Path, toy: Any) -> None:
    url = toy.fill(tmp_path)
    digest = open_store(url).cite()
    prepare_store(url, identity=toy.identity(), plan=toy.plan, job={}, layers=(1,))
    UnitWriter(url, (1,)).commit(CapturedUnit(0, toy.rollouts(0), np.ones((4, 1, toy.hidden), dtype=np.float32), {}, {}))
    early = open_store(url, at=digest)
    assert early.layers == (0, 3)
    with pytest.raises(InputError, match=r"layer 1 was not captured; there are \[0, 3\]"):
        early.rows([1])


def test_a_judge_that_nobody_knows_is_said(tmp_path: Path, toy: Any) -> None:
    rows = open_store(toy.fill(tmp_path)).rows()
    with pytest.raises(InputError, match="no judge nobody has scored here"):
        rows.scores("nobody")
