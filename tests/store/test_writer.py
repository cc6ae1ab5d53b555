from __future__ import annotations

import hashlib
import json
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import zarr

from persona_ray.errors import IntegrityError, StateError
from persona_ray.store.folder import FolderBackend
from persona_ray.store.ledger import Ledger
from persona_ray.store.writer import REFUSED_EARLIER, UnitWriter

Tree = Callable[[Path], dict[str, bytes]]


def check_markers(folder: Path) -> None:
    """Size and digest of every object that a marker names are those of the file."""
    for path in (folder / "_commits").iterdir():
        for key, record in json.loads(path.read_text())["objects"].items():
            data = (folder / key).read_bytes()
            assert record == {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def rounded(values: np.ndarray) -> np.ndarray:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def test_a_filled_store_holds_what_was_captured(tmp_path: Path, toy: Any) -> None:
    toy.fill(tmp_path, refused={5: "empty answer"})
    check_markers(tmp_path)
    group = zarr.open_group(tmp_path, mode="r")
    expected = np.concatenate([rounded(toy.activations(unit)) for unit in toy.plan.units])
    expected[5] = np.nan
    np.testing.assert_array_equal(group["activations"][:10], expected)
    assert np.isnan(group["activations"][10:]).all()
    assert group["status"][:].tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, -1, -1]
    assert group["committed"][:].tolist() == [1] * 10 + [0] * 2
    assert group["finish_reason"][:].tolist() == [0, 1] * 5 + [-1, -1]
    assert group["response_tokens"][:].tolist() == [1, 2, 3, 1, 2, 0, 1, 2, 3, 1, 0, 0]


def test_a_unit_is_five_objects_a_marker_and_its_committed_chunk(tmp_path: Path, toy: Any, tree: Tree) -> None:
    toy.prepare(tmp_path)
    before = tree(tmp_path).keys()
    toy.fill(tmp_path, units=range(2, 3))
    marker = json.loads((tmp_path / "_commits/000002.json").read_text())
    assert list(marker["objects"]) == [
        "rollouts/part-000002.parquet",
        "activations/c/2/0/0",
        "response_tokens/c/2",
        "finish_reason/c/2",
        "status/c/2",
    ]
    assert (marker["unit"], marker["first_row"], marker["num_rows"], marker["refused"]) == (2, 8, 2, [])
    assert marker["made"] == {"kernel": "eager", "seed": 0}
    assert tree(tmp_path).keys() - before == {*marker["objects"], "_commits/000002.json", "committed/c/2"}


def test_the_text_comes_back_and_the_first_one_stays(tmp_path: Path, toy: Any) -> None:
    toy.prepare(tmp_path)
    writer = UnitWriter(str(tmp_path))
    assert writer.read_rollouts(1) is None
    first = toy.rollouts(1, said="\N{GRINNING FACE} first", refusals={6: "empty answer"})
    assert_equal_rollouts(writer.write_rollouts(1, first), first)
    assert_equal_rollouts(writer.write_rollouts(1, toy.rollouts(1, said="second, and longer")), first)
    stored = UnitWriter(str(tmp_path)).read_rollouts(1)
    assert stored is not None
    assert_equal_rollouts(stored, first)
    assert stored[0].token_ids.dtype == np.int32


def assert_equal_rollouts(ours: Any, theirs: Any) -> None:
    assert [replace(rollout, token_ids=rollout.token_ids.tolist()) for rollout in ours] == [
        replace(rollout, token_ids=rollout.token_ids.tolist()) for rollout in theirs
    ]


def test_a_late_writer_with_other_values_changes_nothing(tmp_path: Path, toy: Any, tree: Tree) -> None:
    toy.fill(tmp_path)
    before = tree(tmp_path)
    straggler = UnitWriter(str(tmp_path))
    straggler.write_rollouts(1, toy.rollouts(1, said="something else"))
    straggler.commit(toy.captured(1, seed=99, refused={4: "late"}))
    assert tree(tmp_path) == before


def test_a_crash_anywhere_leaves_the_unit_uncommitted_and_the_retry_commits_the_first_bytes(
    tmp_path: Path, toy: Any, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = ["rollouts", "activations", "response_tokens", "finish_reason", "status", "_commits", "committed"]
    create = FolderBackend.create_once
    for num_done in range(len(order)):
        folder = tmp_path / str(num_done)
        toy.prepare(folder)
        created: list[str] = []

        def dying(self: FolderBackend, key: str, data: bytes, created: list[str] = created, allowed: int = num_done) -> Any:
            if len(created) == allowed:
                raise KeyboardInterrupt
            created.append(key)
            return create(self, key, data)

        writer = UnitWriter(str(folder))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the attempt is both steps
            patch.setattr(FolderBackend, "create_once", dying)
            writer.write_rollouts(0, toy.rollouts(0, said="first"))
            writer.commit(toy.captured(0, seed=1, rollouts=toy.rollouts(0, said="first"), refused={2: "out of luck"}))
        assert [key.partition("/")[0] for key in created] == order[:num_done]
        is_committed = num_done > order.index("_commits")
        assert Ledger(str(folder)).committed() == (frozenset({0}) if is_committed else frozenset())
        left = {key: data for key, data in tree(folder).items() if key in created}

        retry = UnitWriter(str(folder))
        texts = retry.write_rollouts(0, toy.rollouts(0, said="second"))
        assert texts[0].response == ("first" if num_done else "second")
        retry.commit(toy.captured(0, seed=2, rollouts=texts))
        after = tree(folder)
        assert {key: after[key] for key in left} == left
        assert Ledger(str(folder)).committed() == {0}
        check_markers(folder)
        group = zarr.open_group(folder, mode="r")
        seed = 1 if num_done > order.index("activations") else 2
        kept = [0, 1, 3] if seed == 1 else [0, 1, 2, 3]
        np.testing.assert_array_equal(group["activations"][kept], rounded(toy.activations(0, seed))[kept])
        assert group["status"][:4].tolist() == [0, 0, int(seed == 1), 0]
        marker = Ledger(str(folder)).marker(0)
        assert marker is not None
        reason = "out of luck" if is_committed else REFUSED_EARLIER
        assert marker.refused == ({2: reason} if seed == 1 else {})


def test_writers_of_one_unit_at_once_leave_one_set_of_bytes(tmp_path: Path, toy: Any) -> None:
    toy.prepare(tmp_path)
    num_writers = 6
    barrier = threading.Barrier(num_writers)
    failures: list[BaseException] = []

    def attempt(seed: int) -> None:
        try:
            writer = UnitWriter(str(tmp_path))
            barrier.wait()
            texts = writer.write_rollouts(0, toy.rollouts(0, said=f"writer {seed}" * seed))
            writer.commit(toy.captured(0, seed=seed, rollouts=texts, refused={seed % 4: f"by {seed}"}))
        except BaseException as error:  # noqa: BLE001 - a thread's failure must reach the test
            failures.append(error)

    threads = [threading.Thread(target=attempt, args=(seed,)) for seed in range(1, num_writers + 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    check_markers(tmp_path)
    group = zarr.open_group(tmp_path, mode="r")
    stored = group["activations"][:4]
    (winner,) = (
        seed
        for seed in range(1, num_writers + 1)
        if np.array_equal(np.delete(stored, seed % 4, axis=0), np.delete(rounded(toy.activations(0, seed)), seed % 4, axis=0))
    )
    assert group["status"][:4].tolist() == [int(row == winner % 4) for row in range(4)]
    marker = Ledger(str(tmp_path)).marker(0)
    assert marker is not None
    assert list(marker.refused) == [winner % 4]


def test_bf16_exact_rounds_as_ml_dtypes_does_and_float32_not_at_all(tmp_path: Path, make_toy: Any) -> None:
    ties = np.array([1.00390625, 1.01171875, -1.00390625, 3.14159274, 1e-40, 65504.0], dtype=np.float32)
    for store_dtype in ("bf16-exact", "float32"):
        toy = make_toy(rows=1, unit_rows=1, layers=(0,), hidden=6, store_dtype=store_dtype)
        folder = tmp_path / store_dtype
        toy.prepare(folder)
        writer = UnitWriter(str(folder))
        writer.write_rollouts(0, toy.rollouts(0))
        writer.commit(toy.captured(0, activations=ties.reshape(1, 1, 6)))
        group = zarr.open_group(folder, mode="r")
        expected = rounded(ties) if store_dtype == "bf16-exact" else ties
        assert group["activations"][0, 0].tobytes() == expected.tobytes()
        assert ("exact_in" in group["activations"].attrs) == (store_dtype == "bf16-exact")
    assert rounded(ties)[0] == 1.0


def test_a_row_refused_by_its_text_is_stored_as_refused(tmp_path: Path, toy: Any) -> None:
    toy.prepare(tmp_path)
    texts = toy.rollouts(0, refusals={1: "template: the answer does not decode back"})
    writer = UnitWriter(str(tmp_path))
    writer.write_rollouts(0, texts)
    writer.commit(toy.captured(0, rollouts=texts))
    marker = Ledger(str(tmp_path)).marker(0)
    assert marker is not None
    assert marker.refused == {1: "template: the answer does not decode back"}
    assert np.isnan(zarr.open_group(tmp_path, mode="r")["activations"][1]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, 3.4e38])
def test_numbers_that_are_none_stop_the_commit(tmp_path: Path, toy: Any, tree: Tree, value: float) -> None:
    toy.prepare(tmp_path)
    writer = UnitWriter(str(tmp_path))
    writer.write_rollouts(1, toy.rollouts(1))
    before = tree(tmp_path)
    activations = toy.activations(1)
    activations[2, 1, 3] = value
    with pytest.raises(IntegrityError, match=r"unit 000001: NaN or Inf in rows \[6\]"):
        writer.commit(toy.captured(1, activations=activations))
    assert tree(tmp_path) == before


def test_what_does_not_fit_the_plan_is_refused(tmp_path: Path, toy: Any, tree: Tree) -> None:
    toy.prepare(tmp_path)
    writer = UnitWriter(str(tmp_path))
    writer.write_rollouts(0, toy.rollouts(0))
    before = tree(tmp_path)
    good = toy.captured(0)
    for captured, words in (
        (replace(good, index=3), "in no plan"),
        (
            replace(good, activations_RLD=good.activations_RLD[:, :1]),
            r"float32 \(4, 1, 6\), the store wants float32 \(4, 2, 6\)",
        ),
        (replace(good, activations_RLD=good.activations_RLD.astype(np.float64)), "float64"),
        (replace(good, rollouts=good.rollouts[::-1]), "in order"),
        (replace(good, rollouts=good.rollouts[:3], activations_RLD=good.activations_RLD[:3]), "in order"),
        (replace(good, refused={7: "not mine"}), "not its own"),
    ):
        with pytest.raises(IntegrityError, match=words):
            writer.commit(captured)
    with pytest.raises(IntegrityError, match="in no plan"):
        writer.read_rollouts(3)
    with pytest.raises(IntegrityError, match="in order"):
        writer.write_rollouts(1, toy.rollouts(0))
    assert tree(tmp_path) == before


def test_numbers_of_another_text_or_without_text_are_refused(tmp_path: Path, toy: Any) -> None:
    toy.prepare(tmp_path)
    writer = UnitWriter(str(tmp_path))
    with pytest.raises(StateError, match="before the numbers"):
        writer.commit(toy.captured(0))
    writer.write_rollouts(0, toy.rollouts(0, said="what won"))
    with pytest.raises(StateError, match="other token ids"):
        writer.commit(toy.captured(0, rollouts=toy.rollouts(0, said="what lost, being longer")))
    assert Ledger(str(tmp_path)).committed() == frozenset()


def test_a_writer_travels_as_its_address(tmp_path: Path, toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.prepare(tmp_path / "s")
    monkeypatch.chdir(tmp_path)
    writer = UnitWriter("s")
    assert writer.read_rollouts(0) is None
    data = pickle.dumps(writer)
    monkeypatch.chdir("/")
    assert len(data) < 500
    assert pickle.loads(data).write_rollouts(0, toy.rollouts(0))
    assert (tmp_path / "s/rollouts/part-000000.parquet").exists()


def test_equal_attempts_give_equal_bytes(tmp_path: Path, toy: Any, tree: Tree) -> None:
    one, other = tree(Path(toy.fill(tmp_path / "a"))), tree(Path(toy.fill(tmp_path / "b")))
    dated = {key for key in one if key.startswith(("_commits/", "_plans/"))} | {"zarr.json"}
    assert one.keys() == other.keys()
    assert {key: one[key] for key in one.keys() - dated} == {key: other[key] for key in one.keys() - dated}
