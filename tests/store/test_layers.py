"""More layers of rows that are there: arrays and markers of their own, beside those that the store began with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from persona_ray.errors import InputError, IntegrityError
from persona_ray.spec import CapturedUnit
from persona_ray.store.finish import finish_store
from persona_ray.store.growth import layers_to_write
from persona_ray.store.plan_file import PlanFile
from persona_ray.store.plans import Plans
from persona_ray.store.prepare import prepare_store
from persona_ray.store.reader import open_store
from persona_ray.store.repair import gc, requeue
from persona_ray.store.verify import verify
from persona_ray.store.writer import UnitWriter

REFUSED = {1: "empty answer"}


def add(url: Path, toy: Any, layers: tuple[int, ...] = (1, 2)) -> Plans:
    return prepare_store(str(url), identity=toy.identity(), plan=toy.plan, job={"name": "more"}, layers=layers)


def commit(url: Path, toy: Any, unit: int, layers: tuple[int, ...] = (1, 2), seed: int = 7) -> None:
    writer = UnitWriter(str(url), layers)
    texts = writer.read_rollouts(unit)
    assert texts is not None
    values = np.random.default_rng([seed, unit]).normal(size=(len(texts), len(layers), toy.hidden)).astype(np.float32)
    refused = {text.index: REFUSED[text.index] for text in texts if text.index in REFUSED}
    for row in refused:
        values[row - texts[0].index] = np.nan
    writer.commit(CapturedUnit(unit, texts, values, refused, {"kernel": "eager"}))


def grown(folder: Path, toy: Any, units: tuple[int, ...] = (0, 1, 2)) -> Path:
    toy.fill(folder, refused=REFUSED)
    add(folder, toy)
    for unit in units:
        commit(folder, toy, unit)
    finish_store(str(folder))
    return folder


def test_further_layers_are_read_beside_the_first_in_any_order(tmp_path: Path, toy: Any) -> None:
    store = open_store(str(grown(tmp_path, toy)))
    assert store.layers == (0, 1, 2, 3)
    rows = store.rows([3, 1, 0])
    values = rows.activations()
    for place, layer in enumerate((3, 1, 0)):
        np.testing.assert_array_equal(values[:, place], store.layer(layer)[1])
    streamed = np.concatenate([part.activations_RLD for part in store.scored_rows(store.units([3, 1, 0]), None, [3, 1, 0])])
    np.testing.assert_array_equal(streamed, values)
    group = zarr.open_group(tmp_path, mode="r")
    assert group["activations_1"].metadata.dimension_names == ("rollout", "layer_1", "hidden")
    assert group["layer_1"][:].tolist() == [1, 2]
    assert group["committed_1"][:10].tolist() == [1] * 10
    assert verify(str(tmp_path)).is_right


def test_a_pass_over_some_layers_sees_the_rows_that_have_all_of_them(tmp_path: Path, toy: Any) -> None:
    """A row that is refused with the further layers alone is there in the first ones, and counts nowhere where all are wanted."""
    toy.fill(tmp_path)
    add(tmp_path, toy)
    for unit in range(3):
        commit(tmp_path, toy, unit)
    store = open_store(str(tmp_path))

    def rows(layers: list[int], among: list[int] | None) -> list[int]:
        return [row for part in store.scored_rows(range(3), None, layers, among) for row in part.rollout_R.tolist()]

    assert rows([0], None) == list(range(10))
    assert rows([0], [0, 1]) == rows([1], [0, 1]) == [row for row in range(10) if row not in REFUSED]


def test_rows_without_the_further_layers_are_left_out_only_where_these_are_asked_for(tmp_path: Path, toy: Any) -> None:
    store = open_store(str(grown(tmp_path, toy, units=(0, 2))))
    assert len(store.rows()) == 9
    assert store.rows([0, 1]).rollout_N.tolist() == [0, 2, 3, 8, 9]
    assert store.units([1]) == (0, 2)
    assert [part["committed"] for part in store.info()["layer_sets"]] == [3, 2]
    assert verify(str(tmp_path)).is_right
    with pytest.raises(InputError, match=r"layer 4 was not captured; there are \[0, 1, 2, 3\]"):
        store.rows([4])


def test_a_state_knows_which_layers_it_had(tmp_path: Path, toy: Any) -> None:
    toy.fill(tmp_path, refused=REFUSED)
    before = open_store(str(tmp_path)).cite()
    grown(tmp_path, toy)
    now = open_store(str(tmp_path)).cite()
    assert before != now
    assert len(open_store(str(tmp_path), at=now).rows([1])) == 9
    then = open_store(str(tmp_path), at=before)
    assert len(then.rows()) == 9
    with pytest.raises(InputError, match="layer 1 was not captured"):
        then.rows([1])


def test_damage_of_further_layers_is_named_and_they_alone_are_made_again(tmp_path: Path, toy: Any) -> None:
    grown(tmp_path, toy)
    first = {path: path.read_bytes() for path in tmp_path.rglob("*/c/1/0/0") if "activations_1" not in str(path)}
    (tmp_path / "activations_1/c/1/0/0").write_bytes(b"x")
    found = verify(str(tmp_path))
    assert found.wrong_units == (1,)
    (done,) = requeue(str(tmp_path), [1])
    assert done.deleted == ("_commits_1/000001.json", "committed_1/c/1", "activations_1/c/1/0/0")
    assert done.keeps_text
    store = open_store(str(tmp_path))
    assert (store.units(), store.units([1])) == ((0, 1, 2), (0, 2))
    commit(tmp_path, toy, 1)
    finish_store(str(tmp_path))
    assert verify(str(tmp_path)).is_right
    assert {path: path.read_bytes() for path in first} == first
    assert [leftover.why for leftover in gc(str(tmp_path), delete=True, min_age_s=0).leftovers] == [
        "quarantine of unit 000001, which is committed again"
    ] * 2


def test_text_that_is_damaged_takes_all_layers_with_it(tmp_path: Path, toy: Any) -> None:
    grown(tmp_path, toy)
    (tmp_path / "rollouts/part-000002.parquet").unlink()
    assert verify(str(tmp_path)).wrong_units == (2,)
    (done,) = requeue(str(tmp_path), [2])
    assert not done.keeps_text
    assert not list(tmp_path.glob("activations*/c/2/0/0"))
    assert open_store(str(tmp_path)).units([1]) == (0, 1)
    toy.fill(tmp_path, refused=REFUSED)
    commit(tmp_path, toy, 2)
    finish_store(str(tmp_path))
    assert verify(str(tmp_path)).is_right


def test_numbers_of_further_layers_without_their_marker_are_leftovers(tmp_path: Path, toy: Any) -> None:
    grown(tmp_path, toy)
    (tmp_path / "_commits_1/000000.json").unlink()
    (tmp_path / "committed_1/c/0").unlink()
    found = gc(str(tmp_path), delete=True, min_age_s=0)
    assert [(leftover.key, leftover.why) for leftover in found.leftovers] == [
        ("activations_1/c/0/0/0", "unit 000000 of layer set 1 has no marker")
    ]
    assert verify(str(tmp_path)).is_right


def test_layers_that_another_run_added_meanwhile_are_not_added_twice(tmp_path: Path, toy: Any) -> None:
    toy.fill(tmp_path)
    add(tmp_path, toy)
    assert add(tmp_path, toy).layer_sets == ((0, 3), (1, 2))
    with pytest.raises(InputError, match=r"layers \[2\] were added by another run meanwhile"):
        add(tmp_path, toy, (2, 4))
    with pytest.raises(InputError, match=r"no array has exactly the layers \[2\]"):
        UnitWriter(str(tmp_path), (2,)).commit(toy.captured(0))


def test_numbers_of_the_wrong_layers_are_refused(tmp_path: Path, toy: Any) -> None:
    toy.fill(tmp_path)
    add(tmp_path, toy, (1, 2, 4))
    with pytest.raises(IntegrityError, match="the store wants float32"):
        UnitWriter(str(tmp_path), (1, 2, 4)).commit(toy.captured(0))


@pytest.mark.parametrize(
    ("sets", "asked", "written"),
    [
        (((0, 3),), (0, 3), (0, 3)),
        (((0, 3),), (0, 1, 2, 3), (1, 2)),
        (((0, 3),), (5,), (5,)),
        (((0, 3), (1, 2)), (0, 1, 2, 3), (1, 2)),
        (((0, 3), (1,)), (1, 2), (2,)),
        (((0, 3), (1,), (2,)), (1, 2), (0, 3)),
        (((0, 3),), (3,), (3,)),
    ],
)
def test_which_layers_a_run_writes(toy: Any, sets: Any, asked: tuple[int, ...], written: tuple[int, ...]) -> None:
    from persona_ray.store.layers_file import LayersFile

    plans = Plans(
        (PlanFile.new(identity=toy.identity(layers=sets[0]), plan=toy.plan, job={}),),
        tuple(LayersFile.new(layers, {}) for layers in sets[1:]),
    )
    assert layers_to_write(plans, asked) == written
