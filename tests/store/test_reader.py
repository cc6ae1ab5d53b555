from __future__ import annotations

import json
import pickle
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import persona_ray
from persona_ray.errors import InputError, IntegrityError, RetryableError
from persona_ray.spec import Judgement
from persona_ray.store.reader import StoredRows, open_store
from persona_ray.store.scores import ScoreWriter
from persona_ray.store.writer import UnitWriter


def test_what_a_store_says_of_itself(tmp_path: Path, toy: Any) -> None:
    store = persona_ray.open_store(toy.fill(tmp_path, units=range(2), refused={1: "empty answer"}))
    assert store.identity == toy.identity().as_dict()
    assert store.plans.files[0].plan == toy.plan
    assert store.job == {"name": "toy"}
    assert store.attributes["identity_digest"] == toy.identity().digest
    assert store.latest_scores() is None
    assert store.latest_reduced() is None
    info = json.loads(json.dumps(store.info(), allow_nan=False))
    assert info["units"] == {"planned": 3, "committed": 2, "rows": 4}
    assert info["rows"] == {"asked": 10, "stored": 7, "refused": 1, "reasons": {"empty answer": 1}}
    assert info["ledger_digest"] == store.snapshot().digest
    assert info["bytes"] == sum(
        path.stat().st_size
        for folder in ("rollouts", "activations", "response_tokens", "finish_reason", "status")
        for path in (tmp_path / folder).rglob("*")
        if path.is_file() and path.name != "zarr.json"
    )


def test_no_store_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no persona_ray store"):
        open_store(str(tmp_path))


def test_scored_rows_are_the_committed_stored_rows_in_the_order_asked(tmp_path: Path, toy: Any) -> None:
    store = open_store(toy.fill(tmp_path, units=range(0, 3, 2), refused={1: "empty answer", 8: "too long"}))
    last, first = store.scored_rows([2, 1, 0], None)
    assert last.rollout_R.tolist() == [9]
    assert first.rollout_R.tolist() == [0, 2, 3]
    assert first.archetype_R.tolist() == [0, 2, 0]
    assert (first.rollout_R.dtype, first.archetype_R.dtype, first.score_R.dtype) == (np.int64, np.int32, np.int8)
    assert first.score_R.tolist() == [-1, -1, -1]
    expected = toy.activations(0).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(first.activations_RLD, expected[[0, 2, 3]])


def test_scores_join_their_rows(tmp_path: Path, toy: Any) -> None:
    store = open_store(toy.fill(tmp_path, refused={1: "empty answer"}))
    ScoreWriter(store.url, "lexicon-1", {}).write(0, toy.rollouts(0), [Judgement(score, "") for score in (3, 2, 1, 0)])
    scored, unscored = store.scored_rows([0, 1], "lexicon-1")
    assert scored.score_R.tolist() == [3, 1, 0]
    assert unscored.score_R.tolist() == [-1] * 4
    assert store.scored_units("lexicon-1") == {0}
    assert store.scored_units("nobody") == frozenset()


def test_numbers_without_a_marker_are_never_handed_out(tmp_path: Path, toy: Any) -> None:
    store = open_store(toy.fill(tmp_path))
    (tmp_path / "_commits/000001.json").unlink()
    assert [rows.rollout_R.tolist() for rows in store.scored_rows(range(3), None)] == [[0, 1, 2, 3], [8, 9]]
    rows_N, values_ND = store.layer(3)
    assert rows_N.tolist() == [0, 1, 2, 3, 8, 9]
    assert values_ND.shape == (6, 6)


def test_one_layer_of_all_rows(tmp_path: Path, toy: Any) -> None:
    store = open_store(toy.fill(tmp_path, refused={4: "empty answer"}))
    rows_N, values_ND = store.layer(3)
    assert rows_N.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    whole = np.concatenate([toy.activations(unit) for unit in toy.plan.units])[:, 1]
    np.testing.assert_array_equal(values_ND, whole.astype(ml_dtypes.bfloat16).astype(np.float32)[rows_N])
    with pytest.raises(InputError, match=r"layer 1 was not captured; there are \[0, 3\]"):
        store.layer(1)


def test_the_text_of_units(tmp_path: Path, toy: Any) -> None:
    store = open_store(toy.fill(tmp_path))
    texts = list(store.rollouts([2, 0]))
    assert [[rollout.index for rollout in unit] for unit in texts] == [[8, 9], [0, 1, 2, 3]]
    assert texts[1][1].token_ids.tolist() == toy.rollouts(0)[1].token_ids.tolist()
    (tmp_path / "rollouts/part-000001.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(IntegrityError, match=r"part-000001\.parquet"):
        list(store.rollouts([1]))


def test_a_store_with_nothing_in_it_yet(tmp_path: Path, toy: Any) -> None:
    store = open_store(toy.prepare(tmp_path))
    assert list(store.scored_rows(range(3), None)) == []
    rows_N, values_ND = store.layer(0)
    assert (rows_N.shape, values_ND.shape) == ((0,), (0, 6))
    assert store.info()["last_commit"] is None


def test_damage_is_an_error_and_never_a_number(tmp_path: Path, toy: Any) -> None:
    store = open_store(toy.fill(tmp_path))
    shard = tmp_path / "activations/c/1/0/0"
    whole = shard.read_bytes()
    for damaged in (bytes([whole[0] ^ 1]) + whole[1:], whole[:-1] + bytes([whole[-1] ^ 1]), whole[: len(whole) // 2], b""):
        shard.unlink()
        shard.write_bytes(damaged)
        with pytest.raises(IntegrityError, match="activations/c/1/0/0"):
            list(store.scored_rows([1], None))
    shard.unlink()
    for read in (lambda: list(store.scored_rows([1], None)), lambda: store.layer(0), lambda: open_store(store.url).layer(0)):
        with pytest.raises(IntegrityError, match=r"object activations/c/1/0/0 is missing"):
            read()


@pytest.mark.parametrize("is_indexed", [False, True])
def test_damage_of_one_layer_is_an_error_and_never_a_number(tmp_path: Path, toy: Any, is_indexed: bool) -> None:
    """With the index in hand, and without."""
    url = toy.fill(tmp_path)
    whole_ND = open_store(url).layer(0)[1]
    shard = tmp_path / "activations/c/1/0/0"
    intact = shard.read_bytes()
    for damaged in (bytes([intact[0] ^ 1]) + intact[1:], intact[:-1] + bytes([intact[-1] ^ 1]), intact[: len(intact) // 3], b"\1", b""):
        store = open_store(url)
        if is_indexed:
            np.testing.assert_array_equal(store.layer(0)[1], whole_ND)
        shard.unlink()
        shard.write_bytes(damaged)
        if is_indexed and damaged[:1] == intact[:1] and len(damaged) == len(intact):
            np.testing.assert_array_equal(store.layer(0)[1], whole_ND)  # the index alone is damaged, and was read before
            store = open_store(url)
        for read in (lambda store=store: store.layer(0), lambda store=store: list(store.scored_rows([1], None, [0]))):
            with pytest.raises(IntegrityError, match="activations/c/1/0/0: activations "):
                read()
        shard.unlink()
        shard.write_bytes(intact)
        np.testing.assert_array_equal(store.layer(0)[1], whole_ND)


def test_one_layer_of_a_unit_that_was_made_again(tmp_path: Path, toy: Any) -> None:
    """Its index was read before: the new object's chunks lie elsewhere."""
    store = open_store(toy.fill(tmp_path / "a"))
    before_ND = store.layer(3)[1]
    again = toy.captured(1, activations=np.round(toy.activations(1, seed=1)))
    toy.prepare(tmp_path / "b")
    writer = UnitWriter(str(tmp_path / "b"))
    writer.write_rollouts(1, toy.rollouts(1))
    writer.commit(again)
    for key in ("activations/c/1/0/0", "_commits/000001.json"):
        (tmp_path / "a" / key).unlink()
        (tmp_path / "b" / key).rename(tmp_path / "a" / key)
    after_ND = store.layer(3)[1]
    np.testing.assert_array_equal(after_ND[4:8], again.activations_RLD[:, 1])
    np.testing.assert_array_equal(np.delete(after_ND, range(4, 8), axis=0), np.delete(before_ND, range(4, 8), axis=0))


def test_a_reader_travels_as_its_address(tmp_path: Path, toy: Any) -> None:
    source = open_store(toy.fill(tmp_path)).scored_rows
    (rows,) = pickle.loads(pickle.dumps(source))([0], None)
    assert rows.rollout_R.tolist() == [0, 1, 2, 3]


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 9),
    unit_rows=st.integers(1, 5),
    layers=st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True).map(lambda ls: tuple(sorted(ls))),
    hidden=st.integers(1, 9),
    store_dtype=st.sampled_from(["bf16-exact", "float32"]),
    refused=st.sets(st.integers(0, 8)),
)
def test_any_size_comes_back(
    make_toy: Any, rows: int, unit_rows: int, layers: tuple[int, ...], hidden: int, store_dtype: str, refused: set[int]
) -> None:
    toy = make_toy(rows=rows, unit_rows=unit_rows, layers=layers, hidden=hidden, store_dtype=store_dtype)
    refused = {row for row in refused if row < rows}
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(toy.fill(folder, refused=dict.fromkeys(refused, "no luck")))
        parts = list(store.scored_rows(toy.plan.units, None))
        stored = [row for row in range(rows) if row not in refused]
        assert np.concatenate([part.rollout_R for part in parts]).tolist() == stored
        whole = np.concatenate([toy.activations(unit) for unit in toy.plan.units])[stored]
        if store_dtype == "bf16-exact":
            whole = whole.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(np.concatenate([part.activations_RLD for part in parts]), whole)
        np.testing.assert_array_equal(store.layer(layers[-1])[1], whole[:, -1])
        counts = store.ledger.counts()
        assert (counts.asked, counts.stored, counts.refused) == (rows, len(stored), len(refused))


def test_a_pass_that_misses_a_unit_says_so(tmp_path: Path, toy: Any) -> None:
    """Requeued between the listing and the reading: a result without it must not pass for one with it."""
    url = toy.fill(tmp_path, units=range(2), refused=dict.fromkeys(range(4), "empty answer"))
    source = StoredRows(url, None)
    assert [len(rows.rollout_R) for rows in source([0, 1])] == [0, 4]
    with pytest.raises(RetryableError, match="1 of 3 units are not committed any more"):
        list(source([0, 1, 2]))
