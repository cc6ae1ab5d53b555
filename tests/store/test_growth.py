"""A store grows by further plans: what is there is never touched, whoever adds, in whatever order and at the same time."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_ray.errors import InputError, IntegrityError
from persona_ray.spec import CapturedUnit, FinishReason, Judgement, Plan, Rollout, RowKey
from persona_ray.store.finish import finish_store
from persona_ray.store.folder import FolderBackend
from persona_ray.store.growth import further_plan
from persona_ray.store.ledger import Ledger
from persona_ray.store.metadata import settle, store_objects
from persona_ray.store.plan_file import PlanFile
from persona_ray.store.plans import Plans, read_plans
from persona_ray.store.prepare import check_store, prepare_store, preview
from persona_ray.store.reader import open_store
from persona_ray.store.scores import ScoreWriter, publish_scores
from persona_ray.store.text import encode_rollouts
from persona_ray.store.verify import verify
from persona_ray.store.writer import UnitWriter

Tree = Callable[[Path], dict[str, bytes]]
UNIT_ROWS = 4


@dataclass(frozen=True)
class Asked:
    """A job that asks for archetypes x questions. What a row holds depends on its key alone."""

    archetypes: tuple[str, ...]
    questions: int = 3
    layers: tuple[int, ...] = (0, 3)

    @property
    def plan(self) -> Plan:
        keys = tuple(RowKey(name, 0, question, turn=1) for question in range(self.questions) for name in self.archetypes)
        return Plan(
            archetypes=self.archetypes,
            default_archetypes=tuple(name for name in self.archetypes if name == "default"),
            keys=keys,
            unit_rows=UNIT_ROWS,
            text_digests=tuple(f"{key.archetype}/{key.question}" for key in keys),
        )

    def prepare(self, url: str | Path, toy: Any) -> Plans:
        return prepare_store(str(url), identity=toy.identity(), plan=self.plan, job={"name": "+".join(self.archetypes)})


def rollout_of(row: int, key: RowKey) -> Rollout:
    size = 1 + len(key.archetype) + key.question
    return Rollout(row, key, "", f"Question {key.question}?", "Aye.", np.arange(9 + size, dtype=np.int32), 2, 3 + size, FinishReason.STOP)


def write(url: str | Path, plans: Plans, units: Sequence[int]) -> None:
    """Commit units with values that follow from the rows' keys."""
    writer = UnitWriter(str(url))
    for unit in units:
        rollouts = tuple(rollout_of(row, key) for row, key in zip(plans.rows(unit), plans.keys(unit), strict=True))
        values = [np.random.default_rng([*key.archetype.encode(), key.question]).normal(size=(2, 6)) for key in plans.keys(unit)]
        texts = writer.read_rollouts(unit) or writer.write_rollouts(unit, rollouts)
        writer.commit(CapturedUnit(unit, texts, np.array(values, dtype=np.float32), {}, {"hardware": "cpu"}))


def rows_by_key(url: str | Path) -> dict[RowKey, bytes]:
    """The store as a set of rows: key -> text and numbers."""
    store = open_store(str(url))
    rows = store.rows()
    values = rows.activations()
    texts = list(rows.rollouts())
    assert [text.index for text in texts] == rows.rollout_N.tolist()
    found = {text.key: encode_rollouts([replace(text, index=0)]) + values[i].tobytes() for i, text in enumerate(texts)}
    assert len(found) == len(rows)
    return found


FIRST, MORE, QUESTIONS = Asked(("default", "bard")), Asked(("default", "bard", "sage")), Asked(("default", "bard"), questions=5)


def test_a_second_job_adds_the_rows_that_are_missing_and_touches_nothing(tmp_path: Path, toy: Any, tree: Tree) -> None:
    first = FIRST.prepare(tmp_path, toy)
    write(tmp_path, first, first.units)
    before = tree(tmp_path)
    plans = MORE.prepare(tmp_path, toy)
    assert plans.files[1].plan.keys == tuple(RowKey("sage", 0, question, turn=1) for question in range(3))
    assert plans.archetypes == ("default", "bard", "sage")
    assert (first.units, plans.units) == ((0, 1), (0, 1, 2))
    assert plans.num_rows == 9
    write(tmp_path, plans, [2])
    after = tree(tmp_path)
    assert {key: data for key, data in after.items() if key in before and not key.endswith("zarr.json")} == {
        key: data for key, data in before.items() if not key.endswith("zarr.json")
    }
    assert open_store(str(tmp_path)).info()["plans"][1] | {"created": ""} == {
        "created": "",
        "job": "default+bard+sage",
        "rows": 3,
        "units": 1,
        "committed": 1,
        "purpose": None,
    }
    assert verify(str(tmp_path)).is_right


def test_a_grown_store_equals_one_that_was_made_at_once_as_a_set_of_rows(tmp_path: Path, toy: Any) -> None:
    for asked in (FIRST, QUESTIONS, MORE):
        plans = asked.prepare(tmp_path / "grown", toy)
        write(tmp_path / "grown", plans, [unit for unit in plans.units if unit not in Ledger(str(tmp_path / "grown")).committed()])
    # Rows of all three jobs, in one plan.
    keys = tuple(dict.fromkeys((*MORE.plan.keys, *QUESTIONS.plan.keys)))
    once = prepare_store(
        str(tmp_path / "once"), identity=toy.identity(), plan=replace(MORE.plan, keys=keys, text_digests=()), job={"name": "all"}
    )
    write(tmp_path / "once", once, once.units)
    assert rows_by_key(tmp_path / "grown") == rows_by_key(tmp_path / "once")


def test_asking_again_adds_nothing(tmp_path: Path, toy: Any, tree: Tree) -> None:
    FIRST.prepare(tmp_path, toy)
    MORE.prepare(tmp_path, toy)
    before = tree(tmp_path)
    for asked in (FIRST, MORE, Asked(("bard",)), Asked(("sage", "default"), questions=2)):
        assert asked.prepare(tmp_path, toy).num_rows == 9
    assert tree(tmp_path) == before


def test_looking_writes_nothing_and_says_what_would_be(tmp_path: Path, toy: Any, tree: Tree) -> None:
    FIRST.prepare(tmp_path, toy)
    before = tree(tmp_path)
    seen = preview(str(tmp_path), identity=toy.identity(), plan=MORE.plan)
    assert check_store(str(tmp_path), identity=toy.identity(), plan=MORE.plan).units == seen.units
    assert {key for key in tree(tmp_path) if not key.startswith("_probe")} == set(before)
    assert seen.files[1].plan == MORE.prepare(tmp_path, toy).files[1].plan


def test_a_row_key_stands_for_one_text(tmp_path: Path, toy: Any, tree: Tree) -> None:
    FIRST.prepare(tmp_path, toy)
    before = tree(tmp_path)
    other = replace(MORE.plan, text_digests=tuple(digest.replace("bard/1", "changed") for digest in MORE.plan.text_digests))
    with pytest.raises(InputError, match="1 rows of bard have other texts in the store") as caught:
        prepare_store(str(tmp_path), identity=toy.identity(), plan=other, job={})
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="bard is the default Assistant in the job alone"):
        prepare_store(str(tmp_path), identity=toy.identity(), plan=replace(MORE.plan, default_archetypes=("default", "bard")), job={})
    assert tree(tmp_path) == before


def test_many_claim_at_the_same_moment_and_nothing_is_dropped_or_doubled(tmp_path: Path, toy: Any) -> None:
    FIRST.prepare(tmp_path, toy)
    jobs = [Asked(("default", f"role{number % 5}", f"part{number}"), questions=2 + number % 3) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda asked: asked.prepare(tmp_path, toy), jobs))
    plans = read_plans(FolderBackend(tmp_path))
    keys = [key for file in plans.files for key in file.plan.keys]
    assert len(keys) == len(set(keys))
    assert set(keys) == {key for asked in (FIRST, *jobs) for key in asked.plan.keys}
    units = [set(file.plan.units) for file in plans.files]
    assert sum(map(len, units)) == len(set.union(*units))
    # Whoever was last has written metadata for all of them.
    root, *_ = (store_objects(plans)["zarr.json"],)
    assert (tmp_path / "zarr.json").read_bytes() == root
    assert verify(str(tmp_path)).flaws == ()


def test_a_writer_that_opened_before_the_plan_came_writes_its_units(tmp_path: Path, toy: Any) -> None:
    plans = FIRST.prepare(tmp_path, toy)
    writer, reader = UnitWriter(str(tmp_path)), open_store(str(tmp_path))
    assert writer.read_rollouts(0) is None
    assert reader.units() == ()
    grown = MORE.prepare(tmp_path, toy)
    rollouts = tuple(rollout_of(row, key) for row, key in zip(grown.rows(2), grown.keys(2), strict=True))
    writer.write_rollouts(2, rollouts)
    writer.commit(CapturedUnit(2, rollouts, np.ones((3, 2, 6), np.float32), {}, {}))
    (rows,) = reader.scored_rows([2], None)
    assert rows.rollout_R.tolist() == [8, 9, 10]
    assert [reader.archetypes[code] for code in rows.archetype_R] == ["sage"] * 3
    with pytest.raises(IntegrityError, match="unit 000003 is in no plan"):
        writer.read_rollouts(3)
    write(tmp_path, plans, plans.units)
    finish_store(str(tmp_path))
    assert verify(str(tmp_path)).is_right


def test_a_plan_whose_run_died_after_the_claim_is_brought_in_by_the_next(tmp_path: Path, toy: Any, tree: Tree) -> None:
    FIRST.prepare(tmp_path / "whole", toy)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    MORE.prepare(tmp_path / "whole", toy)
    claim = (tmp_path / "whole/_plans/000001.json").read_bytes()
    (tmp_path / "part/_plans/000001.json").write_bytes(claim)
    found = verify(str(tmp_path / "part"))
    assert found.flaws == ()
    assert found.notes == ("metadata behind: the end of the next run brings them up to date",)
    settle(FolderBackend(tmp_path / "part"))
    whole, part = tree(tmp_path / "whole"), tree(tmp_path / "part")
    assert {key: data for key, data in part.items() if key != "zarr.json"} == {
        key: data for key, data in whole.items() if key != "zarr.json"
    }
    assert verify(str(tmp_path / "part")).notes == ()


def test_metadata_that_a_straggler_put_back_are_found_and_mended(tmp_path: Path, toy: Any) -> None:
    FIRST.prepare(tmp_path, toy)
    old = {path: path.read_bytes() for path in tmp_path.rglob("zarr.json")}
    plans = MORE.prepare(tmp_path, toy)
    write(tmp_path, plans, plans.units)
    new = {path: path.read_bytes() for path in old}
    for path, data in old.items():
        path.write_bytes(data)
    assert len(open_store(str(tmp_path)).layer(0)[0]) == 9, "our reader believes the plans"
    assert verify(str(tmp_path)).notes == ("metadata behind: the end of the next run brings them up to date",)
    finish_store(str(tmp_path))
    assert {path: path.read_bytes() for path in old} == new


def test_scores_grow_with_the_store(tmp_path: Path, toy: Any) -> None:
    plans = FIRST.prepare(tmp_path, toy)
    write(tmp_path, plans, plans.units)
    scores = ScoreWriter(str(tmp_path), "judge-1", {})
    for unit, rollouts in zip(plans.units, open_store(str(tmp_path)).rollouts(plans.units), strict=True):
        scores.write(unit, rollouts, [Judgement(2, "so so")] * len(rollouts))
    grown = MORE.prepare(tmp_path, toy)
    write(tmp_path, grown, [2])
    scores.write(2, next(open_store(str(tmp_path)).rollouts([2])), [Judgement(3, "yes")] * 3)
    publish_scores(str(tmp_path), "judge-1")
    assert open_store(str(tmp_path)).select(score=3).archetype_names == ["sage"] * 3
    assert verify(str(tmp_path)).is_right


def test_other_readers_see_the_whole_store_after_it_has_grown(tmp_path: Path, toy: Any) -> None:
    plans = FIRST.prepare(tmp_path, toy)
    write(tmp_path, plans, plans.units)
    grown = MORE.prepare(tmp_path, toy)
    write(tmp_path, grown, [2])
    dataset = xarray.open_zarr(tmp_path)
    is_there = dataset.committed.values == 1
    assert dataset.sizes["rollout"] == grown.padded_rows
    assert dataset.rollout.values.tolist() == list(range(grown.padded_rows))
    names = dataset.archetype.attrs["flag_meanings"].split()
    assert sorted(names[code] for code in dataset.archetype.values[is_there & (dataset.archetype.values >= 0)]) == sorted(
        key.archetype for file in grown.files for key in file.plan.keys
    )
    np.testing.assert_array_equal(
        dataset.activations.values[open_store(str(tmp_path)).rows().rollout_N], open_store(str(tmp_path)).rows().activations()
    )


@settings(max_examples=40, deadline=None)
@given(
    jobs=st.lists(
        st.builds(
            Asked,
            st.lists(st.sampled_from(["default", "bard", "sage", "pirate", "judge"]), min_size=1, max_size=4, unique=True).map(tuple),
            st.integers(1, 9),
        ),
        min_size=1,
        max_size=5,
    ),
    chunk_units=st.integers(1, 4),
)
def test_plans_hold_every_row_once_on_units_and_chunks_of_their_own(jobs: list[Asked], chunk_units: int) -> None:
    from tests.store.conftest import Toy

    identity = Toy().identity()
    plans: Plans | None = None
    for asked in jobs:
        plan = asked.plan if plans is None else further_plan(plans, asked.plan)
        if plan is None:
            continue
        file = PlanFile.new(identity=identity, plan=plan, job={}, chunk_units=chunk_units)
        plans = Plans((*(() if plans is None else plans.files), file))
    assert plans is not None
    keys = [key for unit in plans.units for key in plans.keys(unit)]
    assert sorted(keys) == sorted({key for asked in jobs for key in asked.plan.keys})
    rows = [row for unit in plans.units for row in plans.rows(unit)]
    assert rows == sorted(set(rows))
    assert len(rows) == len(keys) == plans.num_rows
    chunks = [{unit // chunk_units for unit in file.plan.units} for file in plans.files]
    assert sum(map(len, chunks)) == len(set.union(*chunks))
    for unit in range(plans.padded_rows // UNIT_ROWS + 2):
        assert (unit in plans) == (unit in plans.units)
    for file in plans.files:
        assert PlanFile.from_bytes(file.to_bytes(), "") == file


def test_a_gap_in_the_plans_is_named(tmp_path: Path, toy: Any) -> None:
    for asked in (FIRST, MORE, QUESTIONS):
        asked.prepare(tmp_path, toy)
    (tmp_path / "_plans/000001.json").unlink()
    with pytest.raises(IntegrityError, match=r"_plans/000001\.json is missing, and later ones are there"):
        open_store(str(tmp_path))


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_order_of_plans_and_commits_gives_the_same_rows(data: st.DataObject) -> None:
    from tests.store.conftest import Toy

    toy = Toy()
    with tempfile.TemporaryDirectory() as folder:
        jobs = data.draw(st.permutations([FIRST, MORE, QUESTIONS]))
        done: set[int] = set()
        for asked in jobs:
            plans = asked.prepare(folder, toy)
            possible = [unit for unit in plans.units if unit not in done]
            chosen = data.draw(st.lists(st.sampled_from(possible), unique=True)) if possible else []
            write(folder, plans, chosen)
            done |= set(chosen)
        plans = read_plans(FolderBackend(Path(folder)))
        write(folder, plans, data.draw(st.permutations([unit for unit in plans.units if unit not in done])))
        found = rows_by_key(folder)
    assert set(found) == {key for asked in jobs for key in asked.plan.keys}
    expected = {key: np.random.default_rng([*key.archetype.encode(), key.question]).normal(size=(2, 6)) for key in found}
    for key, stored in found.items():
        import ml_dtypes

        assert stored.endswith(expected[key].astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32).tobytes())
