"""Statistics that are kept: whoever goes on reads only what is new, and gets what one pass over everything would give."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from persona_ray import accumulating
from persona_ray.accumulating import Accumulation, KeepingUp
from persona_ray.config import ReduceConfig
from persona_ray.errors import IntegrityError
from persona_ray.reduce import blocks
from persona_ray.reduce.incremental import IncrementalPCA
from persona_ray.reduce.merging import in_process
from persona_ray.reduce.moments import Moments
from persona_ray.reduce.pca import principal_components
from persona_ray.reduce.persona_space import Block
from persona_ray.spec import Judgement
from persona_ray.store.checkpoint import FOLDER, checkpoints
from persona_ray.store.prepare import prepare_store
from persona_ray.store.reader import StoreReader, open_store
from persona_ray.store.repair import gc, requeue
from persona_ray.store.scores import ScoreWriter
from persona_ray.store.writer import UnitWriter

UNIT_ROWS, NUM_UNITS, LEG = 4, 9, 2
"""Units of four rows; a checkpoint after two of them."""
RANK = 2
"""Below what the rows have, so that every state of components has lost something, and when it is cut matters."""


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def big_toy(make_toy: Callable[..., Any]) -> Any:
    return make_toy(rows=UNIT_ROWS * NUM_UNITS - 1, unit_rows=UNIT_ROWS, layers=(0, 1, 4, 5))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Units that were read for moments, in order."""
    units_read: list[int] = []
    really = accumulating.on_cluster

    def spy(source: Any, units: Sequence[int], *rest: Any, **named: Any) -> Any:
        units_read.extend(units)
        return really(source, units, *rest, **named)

    monkeypatch.setattr(accumulating, "on_cluster", spy)
    return units_read


def interrupt_at(unit: int, patch: pytest.MonkeyPatch) -> None:
    """Whoever is about to read this unit is interrupted."""
    really = accumulating.on_cluster

    def interrupted(source: Any, units: Sequence[int], *rest: Any, **named: Any) -> Any:
        if unit in units:
            raise KeyboardInterrupt
        return really(source, units, *rest, **named)

    patch.setattr(accumulating, "on_cluster", interrupted)


def accumulation(store: StoreReader, judge: str | None = None, rows: int | None = LEG * UNIT_ROWS, rank: int | None = None) -> Accumulation:
    return Accumulation(store=store, judge_name=judge, layers=store.layers, checkpoint_rows=rows, rank=rank)


def blocks_of(store: StoreReader, judge: str | None = None, rows: int | None = LEG * UNIT_ROWS, rank: int | None = None) -> list[Block]:
    at = store.snapshot()
    return list(accumulation(store, judge, rows, rank).blocks(store.units(store.layers, at), at, lambda _: None))


def moments_of(store: StoreReader, judge: str | None = None, rows: int | None = LEG * UNIT_ROWS) -> dict[tuple[int, ...], Moments]:
    return {tuple(block.layers): block.moments for block in blocks_of(store, judge, rows)}


def pca_of(store: StoreReader, judge: str | None = None, rows: int | None = LEG * UNIT_ROWS, rank: int = RANK) -> IncrementalPCA:
    (block,) = blocks_of(store, judge, rows, rank)
    assert isinstance(block.pca, IncrementalPCA)
    return block.pca


def assert_same_state(found: IncrementalPCA, expected: IncrementalPCA) -> None:
    assert (found.rank, found.count) == (expected.rank, expected.count)
    for name in ("mean_LD", "total_L", "factor_LMD"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def assert_as_in_one_pass(found: dict[tuple[int, ...], Moments], store: StoreReader, judge: str | None = None) -> None:
    for layers, moments in found.items():
        plain = in_process(lambda units, at=layers: store.scored_rows(units, judge, at), sorted(store.ledger.committed()), Moments.of)
        assert set(moments.groups) == set(plain.groups)
        for group, expected in plain.groups.items():
            assert moments.groups[group].count == expected.count
            np.testing.assert_allclose(moments.groups[group].mean_LD, expected.mean_LD, rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(moments.groups[group].m2_LD, expected.m2_LD, rtol=1e-10, atol=1e-12)


def judge_as(store: StoreReader, name: str, score_of: Callable[[int], int]) -> None:
    writer = ScoreWriter(store.url, name, {"name": name})
    for unit in sorted(store.ledger.committed()):
        (rollouts,) = store.rollouts([unit])
        writer.write(unit, rollouts, [Judgement(score_of(rollout.index), "as told") for rollout in rollouts])


def test_a_store_that_has_grown_is_not_read_again(tmp_path: Path, big_toy: Any, read: list[int]) -> None:
    store = open_store(big_toy.fill(tmp_path / "store", units=range(5)))
    moments_of(store)
    assert read == [0, 1, 2, 3, 4]
    read.clear()
    big_toy.fill(tmp_path / "store", units=range(5, NUM_UNITS))
    assert_as_in_one_pass(moments_of(store), store)
    assert read == [4, 5, 6, 7, 8]  # the fifth made no whole checkpoint


def test_without_checkpoints_nothing_is_kept(tmp_path: Path, big_toy: Any, read: list[int]) -> None:
    store = open_store(big_toy.fill(tmp_path / "store", refused={3: "empty", 9: "NaN"}))
    for _ in range(2):
        assert_as_in_one_pass(moments_of(store, rows=None), store)
    assert read == [*range(NUM_UNITS)] * 2
    assert not (tmp_path / "store" / FOLDER).exists()


def test_interrupted_in_the_middle_it_goes_on_from_the_last_checkpoint(
    tmp_path: Path, big_toy: Any, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(big_toy.fill(tmp_path / "store"))
    with monkeypatch.context() as patch:
        interrupt_at(4, patch)
        with pytest.raises(KeyboardInterrupt):
            moments_of(store)
    read.clear()
    assert_as_in_one_pass(moments_of(store), store)
    assert read == [4, 5, 6, 7, 8]


def test_layer_blocks_are_held_one_at_a_time(tmp_path: Path, big_toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(big_toy.fill(tmp_path / "store"))
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3 * blocks.NUM_GROUPS * blocks.BYTES_PER_DIM * big_toy.hidden)
    found = moments_of(store)
    assert list(found) == [(0, 1, 4), (5,)]
    assert_as_in_one_pass(found, store)
    assert {note.layers for layers in found for note in checkpoints(store.url, layers)} == set(found)


def test_another_judge_moves_rows_and_reads_only_those_that_leave_the_others(tmp_path: Path, big_toy: Any, read: list[int]) -> None:
    store = open_store(big_toy.fill(tmp_path / "store", units=range(8)))
    judge_as(store, "first", lambda row: 3)
    moments_of(store, "first")
    read.clear()
    judge_as(store, "second", lambda row: 1 if row in (5, 30) else 2)
    assert_as_in_one_pass(moments_of(store, "second"), store, "second")
    assert read == [1, 7]
    read.clear()
    assert_as_in_one_pass(moments_of(store, None), store)
    assert read == []  # without scores all rows of an archetype are one group


def test_a_unit_that_was_made_anew_is_read_anew(tmp_path: Path, big_toy: Any, read: list[int]) -> None:
    url = big_toy.fill(tmp_path / "store", units=range(4))
    store = open_store(url)
    moments_of(store)
    (tmp_path / "store" / "activations" / "c" / "1" / "0" / "0").write_bytes(b"damaged")
    assert [done.is_redone for done in requeue(url, [1])] == [True]
    UnitWriter(url).commit(big_toy.captured(1, seed=7))
    read.clear()
    store = open_store(url)
    assert_as_in_one_pass(moments_of(store), store)
    assert read == [0, 1, 2, 3]


def test_during_a_run_equals_after_it(tmp_path: Path, big_toy: Any, read: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accumulating, "LOOK_EVERY_S", 0.02)
    store = open_store(big_toy.prepare(tmp_path / "store"))
    judged: set[int] = set()
    with KeepingUp(accumulation(store), judged.update):
        for unit in (3, 0, 8, 1, 2, 7, 4, 5):
            big_toy.fill(tmp_path / "store", units=range(unit, unit + 1))
            time.sleep(0.1)
        wait_until(lambda: len(read) >= 6)
    assert judged >= set(read)
    assert sorted(read) == [0, 1, 2, 3, 4, 5]  # what may still be added to is left for later
    big_toy.fill(tmp_path / "store", units=range(6, 7))
    read.clear()
    assert_as_in_one_pass(moments_of(store), store)
    assert read == [6, 7, 8]


def test_components_have_the_same_bits_whenever_units_came_and_who_read_them(
    tmp_path: Path, big_toy: Any, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the run, during it in any order, and by one that was killed in between."""
    after = pca_of(open_store(big_toy.fill(tmp_path / "after")))
    assert after.count == UNIT_ROWS * NUM_UNITS - 1
    read.clear()
    monkeypatch.setattr(accumulating, "LOOK_EVERY_S", 0.02)
    store = open_store(big_toy.prepare(tmp_path / "store"))
    with KeepingUp(accumulation(store, rank=RANK), lambda _: None):
        for unit in (3, 0, 8, 2, 7, 1):
            big_toy.fill(tmp_path / "store", units=range(unit, unit + 1))
        wait_until(lambda: len(read) >= 4)
    assert sorted(read) == [0, 1, 2, 3]
    big_toy.fill(tmp_path / "store", units=range(4, 7))
    with monkeypatch.context() as patch:
        interrupt_at(6, patch)
        with pytest.raises(KeyboardInterrupt):
            pca_of(store)
    read.clear()
    assert_same_state(pca_of(store), after)
    assert read == [6, 7, 8]


def test_components_do_not_depend_on_the_judge_and_another_rank_reads_again(tmp_path: Path, big_toy: Any, read: list[int]) -> None:
    store = open_store(big_toy.fill(tmp_path / "store", units=range(8)))
    judge_as(store, "first", lambda row: 3)
    before = pca_of(store, "first")
    read.clear()
    judge_as(store, "second", lambda row: 1 if row == 5 else 2)
    assert_same_state(pca_of(store, "second"), before)
    assert read == [1]
    read.clear()
    assert pca_of(store, "second", rank=RANK + 1).rank == RANK + 1
    assert read == [1, *range(8)]  # too few rows have moved to keep that
    read.clear()
    assert_same_state(pca_of(store, "second"), before)
    assert read == [1]


def test_components_of_a_store_are_those_of_its_rows(tmp_path: Path, big_toy: Any) -> None:
    store = open_store(big_toy.fill(tmp_path / "store", refused={3: "empty", 9: "NaN"}))
    rows_NLD = np.concatenate([rows.activations_RLD for rows in store.scored_rows(range(NUM_UNITS), None)])
    toward_LD = np.ones(rows_NLD.shape[1:])
    found = pca_of(store, rank=64).components(toward_LD)
    expected = principal_components(rows_NLD.astype(np.float64), toward_LD, 64)
    np.testing.assert_allclose(found.explained_variance_LK, expected.explained_variance_LK, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.mean_LD, expected.mean_LD, rtol=1e-10, atol=1e-12)


def test_a_beginning_of_refused_rows_alone_stops_nothing(tmp_path: Path, big_toy: Any) -> None:
    refused = dict.fromkeys(range(LEG * UNIT_ROWS), "empty answer")
    store = open_store(big_toy.fill(tmp_path / "store", refused=refused))
    assert_as_in_one_pass(moments_of(store), store)
    assert pca_of(store).count == UNIT_ROWS * NUM_UNITS - 1 - len(refused)


def test_legs_stay_as_they_are_when_archetypes_are_added(tmp_path: Path, big_toy: Any, make_toy: Callable[..., Any]) -> None:
    url = big_toy.fill(tmp_path / "store")
    before = Accumulation.of(open_store(url), ReduceConfig(), None, big_toy.layers).units_per_leg
    more = make_toy(rows=40, unit_rows=UNIT_ROWS, layers=big_toy.layers, archetypes=("default", "bard", "sage", "pirate"))
    prepare_store(url, identity=big_toy.identity(), plan=more.plan, job={"name": "more"})
    store = open_store(url)
    assert "pirate" in store.archetypes
    assert Accumulation.of(store, ReduceConfig(), None, big_toy.layers).units_per_leg == before


def test_whoever_is_told_that_it_is_over_reads_no_further_leg(tmp_path: Path, big_toy: Any, read: list[int]) -> None:
    store = open_store(big_toy.fill(tmp_path / "store"))
    at = store.snapshot()
    accumulation(store, rank=RANK).keep_up(store.units(store.layers, at), at, lambda: len(read) >= 4)
    assert read == [0, 1, 2, 3]


def test_what_fails_during_a_run_is_done_after_it(
    tmp_path: Path, big_toy: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(accumulating, "LOOK_EVERY_S", 0.02)
    store = open_store(big_toy.fill(tmp_path / "store"))
    was_asked = threading.Event()

    def judge(_: Sequence[int]) -> None:
        was_asked.set()
        raise ConnectionError("the judge is away")

    with KeepingUp(accumulation(store), judge):
        assert was_asked.wait(20)
    assert "the judge is away" in caplog.text
    assert_as_in_one_pass(moments_of(store), store)


def test_auto_keeps_them_after_two_hundred_rows_for_each_archetype(tmp_path: Path, big_toy: Any) -> None:
    store = open_store(big_toy.prepare(tmp_path / "store"))
    assert Accumulation.of(store, ReduceConfig(), None, store.layers).checkpoint_rows == 200 * 3
    assert Accumulation.of(store, ReduceConfig(checkpoint_rows=None), None, store.layers).units_per_leg is None
    assert Accumulation.of(store, ReduceConfig(checkpoint_rows=9), None, store.layers).units_per_leg == 3


def test_gc_removes_what_later_ones_include_and_nothing_breaks(tmp_path: Path, big_toy: Any, read: list[int]) -> None:
    store = open_store(big_toy.fill(tmp_path / "store"))
    moments_of(store)
    before = sorted((tmp_path / "store" / FOLDER).iterdir())
    found = gc(store.url, delete=True, min_age_s=0)
    assert all(leftover.key.startswith(f"{FOLDER}/") for leftover in found.leftovers)
    after = sorted((tmp_path / "store" / FOLDER).iterdir())
    assert (len(before), len(after)) == (8, 2)
    read.clear()
    assert_as_in_one_pass(moments_of(store), store)
    assert read == [8]


def test_a_damaged_checkpoint_says_that_it_can_be_deleted(tmp_path: Path, big_toy: Any) -> None:
    store = open_store(big_toy.fill(tmp_path / "store"))
    moments_of(store)
    newest = checkpoints(store.url, store.layers)[0]
    path = tmp_path / "store" / FOLDER / f"{newest.name}.safetensors"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert hashlib.sha256(path.read_bytes()).hexdigest() != newest.sha256
    with pytest.raises(IntegrityError, match="delete _moments/"):
        moments_of(store)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)
