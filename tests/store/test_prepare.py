from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zarr

from persona_ray.errors import InputError, StateError
from persona_ray.spec import Plan, RowKey
from persona_ray.store.folder import FolderBackend
from persona_ray.store.ledger import Ledger
from persona_ray.store.metadata import store_objects
from persona_ray.store.plans import read_plans
from persona_ray.store.prepare import check_store, prepare_store

Tree = Callable[[Path], dict[str, bytes]]


def test_a_new_store_has_all_arrays_and_says_what_it_is(tmp_path: Path, toy: Any) -> None:
    toy.prepare(tmp_path / "s")
    group = zarr.open_group(tmp_path / "s", mode="r")
    assert {name: (array.shape, str(array.dtype), array.metadata.dimension_names) for name, array in group.arrays()} == {
        "activations": ((12, 2, 6), "float32", ("rollout", "layer", "hidden")),
        "rollout": ((12,), "int64", ("rollout",)),
        "layer": ((2,), "int64", ("layer",)),
        **dict.fromkeys(("archetype", "system_prompt", "question", "sample", "turn", "response_tokens"), ((12,), "int32", ("rollout",))),
        **dict.fromkeys(("finish_reason", "status", "committed"), ((12,), "int8", ("rollout",))),
    }
    activations = group["activations"]
    assert (activations.shards, activations.chunks) == ((4, 2, 6), (4, 1, 6))
    assert [codec["name"] for codec in activations.metadata.to_dict()["codecs"][0]["configuration"]["codecs"]][-1] == "crc32c"
    attributes = group.attrs.asdict()
    assert attributes["identity"] == toy.identity().as_dict()
    assert attributes["identity_digest"] == toy.identity().digest
    assert attributes["job"] == {"name": "toy"}
    assert attributes["source_dtype"] == "bfloat16"
    assert attributes["layer_aliases"]["alias_transformerlens"] == "blocks.{l}.hook_resid_post"
    assert group["archetype"].attrs["flag_meanings"].split()[group["archetype"][1]] == "bard"
    assert group["archetype"].attrs["default_archetypes"] == ["default"]


def test_planned_columns_hold_the_plan_and_minus_one_in_the_padding(tmp_path: Path, toy: Any) -> None:
    toy.prepare(tmp_path)
    group = zarr.open_group(tmp_path, mode="r")
    names = [group["archetype"].attrs["flag_meanings"].split()[code] for code in group["archetype"][:10]]
    parts = [group[name][:10].tolist() for name in ("system_prompt", "question", "sample", "turn")]
    assert [RowKey(*key) for key in zip(names, *parts, strict=True)] == list(toy.plan.keys)
    assert all((group[name][10:] == -1).all() for name in ("archetype", "system_prompt", "question", "sample", "turn"))
    assert group["rollout"][:].tolist() == list(range(12))


def test_planned_columns_come_in_few_chunks_of_whole_units(make_toy: Any) -> None:
    from persona_ray.store.layout import planned_arrays
    from persona_ray.store.plan_file import PlanFile
    from persona_ray.store.plans import Plans

    toy = make_toy(rows=70_001, unit_rows=3, layers=(0,), hidden=1)
    archetype = planned_arrays(Plans((PlanFile.new(identity=toy.identity(), plan=toy.plan, job={}),)))["archetype"]
    assert archetype.shape == (70_002,)
    assert archetype.chunks[0] % 3 == 0
    assert -(-archetype.shape[0] // archetype.chunks[0]) == 9


def test_preparing_again_changes_nothing(tmp_path: Path, toy: Any, tree: Tree) -> None:
    toy.prepare(tmp_path)
    before = tree(tmp_path)
    prepare_store(str(tmp_path), identity=toy.identity(), plan=toy.plan, job={"name": "another name"})
    assert tree(tmp_path) == before


def test_an_interrupted_creation_is_completed_to_the_same_bytes(
    tmp_path: Path, toy: Any, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    toy.prepare(whole)
    num_objects = len(tree(whole)) - 1  # the plan is there
    for num_done in (1, 2, num_objects // 2, num_objects - 1):
        part = tmp_path / f"part{num_done}"
        part.mkdir()
        shutil.copytree(whole / "_plans", part / "_plans")
        done = 0

        def dying(self: FolderBackend, key: str, data: bytes, real: Any) -> Any:
            nonlocal done
            if done == num_done:  # noqa: B023 - called within the same turn of the loop
                raise KeyboardInterrupt
            done += 1
            return real(self, key, data)

        create, replace_ = FolderBackend.create_once, FolderBackend._replace
        with monkeypatch.context() as patch:
            patch.setattr(FolderBackend, "create_once", lambda self, key, data, real=create: dying(self, key, data, real))
            patch.setattr(FolderBackend, "_replace", lambda self, key, data, real=replace_: dying(self, key, data, real))
            with pytest.raises(KeyboardInterrupt):
                toy.prepare(part)
        assert not (part / "zarr.json").exists()
        toy.prepare(part)
        assert tree(part) == tree(whole)
        shutil.rmtree(part)


def test_all_metadata_follow_from_the_plan_file(tmp_path: Path, toy: Any, tree: Tree) -> None:
    toy.prepare(tmp_path)
    content = store_objects(read_plans(FolderBackend(tmp_path)))
    assert {key: data for key, data in tree(tmp_path).items() if not key.startswith("_")} == content


def test_another_identity_is_refused_by_field_and_both_values(tmp_path: Path, toy: Any, tree: Tree) -> None:
    toy.prepare(tmp_path)
    before = tree(tmp_path)
    other = toy.identity(model_id="toy/other", rollouts={"source": "generate", "seed": 7, "temperature": 0.7})
    for refuse in (
        lambda: check_store(str(tmp_path), identity=other, plan=toy.plan),
        lambda: prepare_store(str(tmp_path), identity=other, plan=toy.plan, job={}),
    ):
        with pytest.raises(InputError) as caught:
            refuse()
        message = str(caught.value)
        assert "model_id is 'toy/model' in the store, 'toy/other' in the job" in message
        assert "rollouts.seed is 0 in the store, 7 in the job" in message
        assert "temperature" not in message
        assert "\n" not in message
    assert tree(tmp_path) == before


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path: Path, toy: Any, tree: Tree) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        toy.prepare(tmp_path)
    assert tree(tmp_path) == {"thesis.tex": b"precious"}


def test_a_store_that_another_run_begins_at_this_moment_is_joined(tmp_path: Path, toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look for its plans and the look for anything else."""
    url = str(tmp_path / "store")
    look = FolderBackend.first_foreign_key

    def look_later(backend: FolderBackend) -> str | None:
        monkeypatch.undo()
        toy.prepare(url)
        return look(backend)

    monkeypatch.setattr(FolderBackend, "first_foreign_key", look_later)
    plans = prepare_store(url, identity=toy.identity(), plan=toy.plan, job={"name": "second"})
    assert [file.job["name"] for file in plans.files] == ["toy"]


def test_folders_without_files_are_an_empty_place(tmp_path: Path, toy: Any) -> None:
    (tmp_path / "store" / "_plans" / "deeper").mkdir(parents=True)
    toy.prepare(tmp_path / "store")
    assert read_plans(FolderBackend(tmp_path / "store")).num_rows == toy.rows


def test_refusals_leave_nothing_behind(tmp_path: Path, toy: Any) -> None:
    (tmp_path / "file").write_text("x")
    for url in (tmp_path / "file", tmp_path / "file" / "s", Path("/proc/persona-ray-store"), Path("/sys/persona-ray-store")):
        with pytest.raises(InputError):
            check_store(str(url), identity=toy.identity(), plan=toy.plan)
        with pytest.raises(InputError):
            toy.prepare(url)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    check_store(str(tmp_path / "new"), identity=toy.identity(), plan=toy.plan)
    assert not (tmp_path / "new").exists()


def test_plans_that_no_store_can_hold(tmp_path: Path, toy: Any) -> None:
    spaced = Plan(archetypes=("a b",), default_archetypes=(), keys=(RowKey("a b", 0, 0),), unit_rows=4)
    with pytest.raises(InputError, match="one word"):
        prepare_store(str(tmp_path), identity=toy.identity(), plan=spaced, job={})
    with pytest.raises(InputError, match="no rows"):
        prepare_store(str(tmp_path), identity=toy.identity(), plan=replace(toy.plan, keys=()), job={})
    with pytest.raises(StateError, match="unit 0"):
        prepare_store(str(tmp_path), identity=toy.identity(), plan=replace(toy.plan, first_unit=1), job={})
    assert list(tmp_path.iterdir()) == []


def test_a_newer_store_is_refused_in_words(tmp_path: Path, toy: Any) -> None:
    toy.prepare(tmp_path)
    path = tmp_path / "_plans/000000.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    with pytest.raises(InputError, match="schema 99"):
        check_store(str(tmp_path), identity=toy.identity(), plan=toy.plan)


def test_a_new_store_asks_for_all_and_has_nothing(tmp_path: Path, toy: Any) -> None:
    toy.prepare(tmp_path)
    counts = Ledger(str(tmp_path)).counts()
    assert (counts.asked, counts.stored, counts.refused) == (10, 0, 0)
    with pytest.raises(InputError, match="no persona_ray store"):
        Ledger(str(tmp_path / "elsewhere")).counts()
