"""What a store will hold is what it holds: keys and requests exactly, bytes nearly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_ray.bench_store.requests import Requests
from persona_ray.bench_store.work import like_a_residual_stream
from persona_ray.spec import CapturedUnit, Judgement
from persona_ray.store.address import open_backend
from persona_ray.store.encoding import encode_unit
from persona_ray.store.expected import (
    GETS_PER_UNIT,
    GETS_PER_UNIT_OF_MORE_LAYERS,
    STORED_SHARE,
    judge_keys,
    plan_objects,
    score_keys,
    unit_bytes,
    unit_keys,
)
from persona_ray.store.folder import FolderBackend
from persona_ray.store.layout import unit_arrays
from persona_ray.store.ledger import Ledger
from persona_ray.store.plans import Plans, read_plans
from persona_ray.store.prepare import prepare_store, preview
from persona_ray.store.scores import ScoreWriter, publish_scores
from persona_ray.store.writer import UnitWriter, padded
from tests.store.conftest import Toy


def plans_of(url: str) -> Plans:
    return read_plans(open_backend(url))


def expected_keys(plans: Plans, url: str) -> set[str]:
    sets = range(len(plans.layer_sets))
    return {*plan_objects(plans, url), *(key for unit in plans.units for number in sets for key in unit_keys(plans, unit, number))}


@pytest.mark.parametrize(("rows", "unit_rows"), [(1, 1), (10, 4), (12, 4), (9, 9)])
def test_every_object_of_a_store_is_foretold_with_the_bytes_of_those_that_follow_from_the_plan(
    tmp_path: Path, make_toy: Callable[..., Any], tree: Callable[[Path], dict[str, bytes]], rows: int, unit_rows: int
) -> None:
    toy = make_toy(rows=rows, unit_rows=unit_rows)
    ahead = preview(str(tmp_path), identity=toy.identity(), plan=toy.plan)
    ahead = replace(ahead, files=tuple(replace(file, job={"name": "toy"}) for file in ahead.files))
    toy.fill(tmp_path)
    found = tree(tmp_path)
    assert expected_keys(ahead, str(tmp_path)) == set(found)
    for key, size in plan_objects(ahead, str(tmp_path)).items():
        assert len(found[key]) == size, key


def test_a_store_that_has_grown_by_rows_and_by_layers(
    tmp_path: Path, make_toy: Callable[..., Any], tree: Callable[[Path], dict[str, bytes]]
) -> None:
    toy, more = make_toy(rows=10), make_toy(rows=17)
    toy.fill(tmp_path)
    there = set(tree(tmp_path))
    grown = prepare_store(str(tmp_path), identity=more.identity(), plan=more.plan, job={})
    assert set(tree(tmp_path)) - there == set(plan_objects(grown, str(tmp_path))) - there
    further = prepare_store(str(tmp_path), identity=more.identity(), plan=more.plan, job={}, layers=(1, 2))
    writer = UnitWriter(str(tmp_path), (1, 2))
    for unit in (0, 1, 2):
        texts = writer.read_rollouts(unit)
        assert texts is not None
        writer.commit(CapturedUnit(unit, texts, np.ones((len(texts), 2, toy.hidden), np.float32), {}, {}))
    expected = {
        *plan_objects(further, str(tmp_path)),
        *(key for unit in (0, 1, 2) for number in (0, 1) for key in unit_keys(further, unit, number)),
    }
    assert set(tree(tmp_path)) == expected


def test_a_bucket_keeps_the_write_probe(make_toy: Callable[..., Any], tmp_path: Path) -> None:
    plans = preview(str(tmp_path), identity=make_toy().identity(), plan=make_toy().plan)
    in_folder, in_bucket = plan_objects(plans, str(tmp_path)), plan_objects(plans, "s3://team/store")
    assert set(in_bucket) - set(in_folder) == {"_probe/write-once"}


def test_a_judge_leaves_what_is_foretold(tmp_path: Path, toy: Any, tree: Callable[[Path], dict[str, bytes]]) -> None:
    toy.fill(tmp_path)
    before, plans = set(tree(tmp_path)), plans_of(str(tmp_path))
    writer = ScoreWriter(str(tmp_path), "words-1", {"backend": "words"})
    for unit in plans.units:
        texts = toy.rollouts(unit)
        writer.write(unit, texts, [Judgement(3, "yes") for _ in texts])
    publish_scores(str(tmp_path), "words-1")
    assert set(tree(tmp_path)) - before == {
        *judge_keys("words-1"),
        *(key for unit in plans.units for key in score_keys(plans, unit, "words-1")),
    }


def asked_for(url: Path, toy: Any, units: range, layers: tuple[int, ...] | None = None) -> dict[str, int]:
    """What a run's driver and a replica's writer ask the store for, after the writer has looked at the plan."""
    writer, ledger, requests = UnitWriter(str(url), layers), Ledger(str(url), 0 if layers is None else 1), Requests()
    assert writer.layer_set == ledger.layer_set
    writer.read_rollouts(0)
    with requests.heard(FolderBackend):
        for unit in units:
            assert not ledger.has(unit)
            texts = writer.read_rollouts(unit) or writer.write_rollouts(unit, toy.rollouts(unit))
            shape = (len(texts), 2, toy.hidden)
            writer.commit(CapturedUnit(unit, texts, np.ones(shape, np.float32), {}, {}))
    return {name: int(count / len(units)) for name, count in requests.counts.items()}


def test_without_faults_there_are_just_so_many_requests(tmp_path: Path, make_toy: Callable[..., Any]) -> None:
    toy = make_toy(rows=24)
    toy.prepare(tmp_path)
    plans = plans_of(str(tmp_path))
    assert asked_for(tmp_path, toy, range(6)) == {"create_once": len(unit_keys(plans, 0)), "get_or_none": GETS_PER_UNIT}
    plans = prepare_store(str(tmp_path), identity=toy.identity(), plan=toy.plan, job={}, layers=(1, 2))
    found = asked_for(tmp_path, toy, range(6), (1, 2))
    assert found == {"create_once": len(unit_keys(plans, 0, 1)), "get_or_none": GETS_PER_UNIT_OF_MORE_LAYERS}


@pytest.mark.parametrize("dtype", STORED_SHARE)
def test_activations_take_the_share_that_is_assumed_of_them(make_toy: Callable[..., Any], tmp_path: Path, dtype: str) -> None:
    """Made-up ones; the tiny model's are in tests/cluster."""
    toy = make_toy(rows=36, unit_rows=36, layers=(0, 1, 2), hidden=512, store_dtype=dtype)
    plans = preview(str(tmp_path), identity=toy.identity(), plan=toy.plan)
    values_RLD = like_a_residual_stream(np.random.default_rng(0), 36, 3, 512)
    toy.prepare(tmp_path)
    writer = UnitWriter(str(tmp_path))
    writer.write_rollouts(0, toy.rollouts(0))
    writer.commit(toy.captured(0, activations=values_RLD))
    stored = sum((tmp_path / key).stat().st_size for key in unit_keys(plans, 0))
    assert abs(unit_bytes(plans, toy.rollouts(0)) / stored - 1) < 0.05
    raw = values_RLD.size * (4 if dtype == "float32" else 2)
    assert abs((tmp_path / unit_keys(plans, 0)[1]).stat().st_size / raw - STORED_SHARE[dtype]) < 0.03


@settings(max_examples=25)
@given(share=st.floats(0.1, 1), rows=st.integers(1, 4))
def test_bytes_follow_the_share(share: float, rows: int) -> None:
    toy = Toy()
    plans = preview("/nowhere/to/be/found", identity=toy.identity(), plan=toy.plan)
    texts = toy.rollouts(0)[:rows]
    raw = rows * len(toy.layers) * toy.hidden * 2
    assert unit_bytes(plans, texts, stored_share=share) - unit_bytes(plans, texts, stored_share=0) == round(share * raw)
    column = encode_unit(unit_arrays(plans)["status"], padded(unit_arrays(plans)["status"], np.zeros(rows)))
    assert unit_bytes(plans, texts, stored_share=0) > len(column)
