from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from persona_ray.errors import IntegrityError
from persona_ray.report.stores import difference_json, difference_table
from persona_ray.spec import CapturedUnit, FinishReason, Float32, Plan, Rollout, RowKey
from persona_ray.store import diff_numbers
from persona_ray.store.diff import StoreDifference, diff_stores
from persona_ray.store.diff_numbers import relative_differences
from persona_ray.store.identity import differing_fields
from persona_ray.store.prepare import prepare_store
from persona_ray.store.reader import StoreReader, open_store
from persona_ray.store.writer import UnitWriter

NAMES = ("default", "bard", "sage")
KEYS = tuple(RowKey(NAMES[i % 3], i % 2, i // 3, sample=i % 2, turn=1) for i in range(13))


def value(key: RowKey, layer: int) -> Float32:
    """Follows from the row's key alone."""
    seed = [*key.archetype.encode(), key.system_prompt, key.question, layer]
    return np.random.default_rng(seed).normal(size=6).astype(np.float32)


def rollout(row: int, key: RowKey) -> Rollout:
    size = 3 + key.question
    return Rollout(row, key, "Be a bard.", "Who?", "Aye.", np.arange(9 + size, dtype=np.int32), 2, 3 + size, FinishReason.STOP)


def make(
    url: Path,
    toy: Any,
    keys: Sequence[RowKey] = KEYS,
    *,
    unit_rows: int = 4,
    layers: tuple[int, ...] = (0, 3),
    store_dtype: str = "float32",
    refused: Sequence[RowKey] = (),
    numbers: Mapping[tuple[RowKey, int], Float32] | None = None,
    texts: Mapping[RowKey, Mapping[str, Any]] | None = None,
    units: int | None = None,
) -> StoreReader:
    plan = Plan(archetypes=NAMES, default_archetypes=NAMES[:1], keys=tuple(keys), unit_rows=unit_rows)
    identity = toy.identity(unit_rows=unit_rows, layers=layers, store_dtype=store_dtype)
    prepare_store(str(url), identity=identity, plan=plan, job={"name": "toy"})
    writer = UnitWriter(str(url))
    for unit in list(plan.units)[:units]:
        first = unit * unit_rows
        members = list(enumerate(keys[first : first + unit_rows], start=first))
        rollouts = tuple(replace(rollout(row, key), **(texts or {}).get(key, {})) for row, key in members)
        values = np.array(
            [[(numbers or {}).get((key, layer), value(key, layer)) for layer in layers] for _, key in members], dtype=np.float32
        )
        reasons = {row: "empty answer" for row, key in members if key in refused}
        for row in reasons:
            values[row - first] = np.nan
        writer.write_rollouts(unit, rollouts)
        writer.commit(CapturedUnit(unit, rollouts, values, reasons, {}))
    return open_store(str(url))


def shown(found: StoreDifference) -> str:
    console = Console(width=250)
    with console.capture() as capture:
        console.print(difference_table(found))
    json.dumps(difference_json(found), allow_nan=False)
    return capture.get()


@settings(max_examples=12, deadline=None)
@given(
    orders=st.tuples(st.permutations(KEYS), st.permutations(KEYS)),
    unit_rows=st.tuples(st.integers(1, 15), st.integers(1, 15)),
    refused=st.sets(st.sampled_from(KEYS), max_size=3),
    cache_units=st.integers(1, 4),
)
def test_any_unit_sizes_and_orders_are_equal(make_toy: Any, orders: Any, unit_rows: Any, refused: set[RowKey], cache_units: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(diff_numbers, "CACHE_BYTES", cache_units * unit_rows[1] * 6 * 4)
        a, b = (
            make(Path(folder) / name, make_toy(), order, unit_rows=rows, refused=sorted(refused))
            for name, order, rows in zip("ab", orders, unit_rows, strict=True)
        )
        found = diff_stores(a, b)
        assert found.is_equal
        assert found.both == 13
        assert [(layer.layer, layer.rows, layer.bit_equal, layer.worst) for layer in found.layers] == [
            (layer, 13 - len(refused), 13 - len(refused), None) for layer in (0, 3)
        ]
        assert [field.name for field in found.identity] == ([] if unit_rows[0] == unit_rows[1] else ["unit_rows"])
        assert "equal as sets of rows, bit by bit" in shown(found)


@settings(max_examples=12, deadline=None)
@given(
    order=st.permutations(KEYS), unit_rows=st.integers(1, 15), place=st.integers(0, 12), layer=st.sampled_from([0, 3]), at=st.integers(0, 5)
)
def test_one_changed_value_is_found_and_its_row_named(make_toy: Any, order: Any, unit_rows: int, place: int, layer: int, at: int) -> None:
    key = KEYS[place]
    changed = value(key, layer)
    changed[at] = np.nextafter(changed[at], np.float32(np.inf))
    with tempfile.TemporaryDirectory() as folder:
        a = make(Path(folder) / "a", make_toy())
        b = make(Path(folder) / "b", make_toy(), order, unit_rows=unit_rows, numbers={(key, layer): changed})
        found = diff_stores(a, b)
        assert not found.is_equal
        right, wrong = sorted(found.layers, key=lambda difference: difference.layer == layer)
        assert (right.bit_equal, right.outside, right.max_relative) == (13, 0, 0.0)
        assert (wrong.bit_equal, wrong.outside, wrong.worst) == (12, 1, key)
        norm = max(np.linalg.norm(values.astype(np.float64)) for values in (changed, value(key, layer)))
        expected = abs(float(changed[at]) - float(value(key, layer)[at])) / norm
        assert wrong.max_relative == pytest.approx(expected)
        assert wrong.mean_relative == pytest.approx(expected / 13)
        assert diff_stores(a, b, tolerance=expected * 1.01).is_equal
        assert not diff_stores(a, b, tolerance=expected * 0.99).is_equal
        assert f"question {key.question}" in shown(found)


@pytest.mark.parametrize(
    ("change", "texts", "token_ids"),
    [
        ({"response": "Nay."}, 1, 0),
        ({"question": "What?"}, 1, 0),
        ({"thinking": "Hm."}, 1, 0),
        ({"finish_reason": FinishReason.LENGTH}, 1, 0),
        ({"token_ids": np.arange(1, 17, dtype=np.int32)}, 0, 1),
        ({"response_start": 1}, 0, 1),
    ],
)
def test_one_changed_text_is_found(tmp_path: Path, toy: Any, change: Any, texts: int, token_ids: int) -> None:
    a, b = make(tmp_path / "a", toy), make(tmp_path / "b", toy, unit_rows=5, texts={KEYS[12]: change})
    found = diff_stores(a, b)
    assert (found.texts, found.token_ids) == ((KEYS[12],) * texts, (KEYS[12],) * token_ids)
    assert not found.is_equal
    assert all(layer.bit_equal == 13 for layer in found.layers)
    assert "1 row with other" in shown(found)


def test_rows_of_one_alone_are_named(tmp_path: Path, toy: Any) -> None:
    a, b = make(tmp_path / "a", toy, KEYS[:9]), make(tmp_path / "b", toy, KEYS[:2:-1], unit_rows=3)
    found = diff_stores(a, b)
    assert (found.both, set(found.only_in_a), set(found.only_in_b)) == (6, set(KEYS[:3]), set(KEYS[9:]))
    assert not found.is_equal
    assert difference_json(found)["only_in_b"]["rows"] == 4
    assert "3 rows only in A" in shown(found)


def test_units_that_are_not_committed_are_not_there(tmp_path: Path, toy: Any) -> None:
    found = diff_stores(make(tmp_path / "a", toy, units=2), make(tmp_path / "b", toy))
    assert (found.both, found.only_in_a, len(found.only_in_b), found.is_equal) == (8, (), 5, False)


def test_a_row_that_one_alone_refused(tmp_path: Path, toy: Any) -> None:
    found = diff_stores(make(tmp_path / "a", toy, refused=KEYS[:1]), make(tmp_path / "b", toy))
    assert (found.status, found.is_equal) == (KEYS[:1], False)
    assert [(layer.rows, layer.only_in_a, layer.only_in_b) for layer in found.layers] == [(12, 0, 1)] * 2


def test_layers_in_another_order_of_sets_and_layers_of_one_alone(tmp_path: Path, toy: Any) -> None:
    a = make(tmp_path / "a", toy, layers=(0, 1, 3))
    b = make(tmp_path / "b", toy, layers=(3,))
    plan = Plan(archetypes=NAMES, default_archetypes=NAMES[:1], keys=KEYS, unit_rows=4)
    identity = toy.identity(layers=(3,), store_dtype="float32")
    prepare_store(b.url, identity=identity, plan=plan, job={}, layers=(0, 5))
    writer = UnitWriter(b.url, (0, 5))
    rollouts = writer.read_rollouts(1)
    assert rollouts is not None
    values = np.array([[value(text.key, layer) for layer in (0, 5)] for text in rollouts])
    writer.commit(CapturedUnit(1, rollouts, values, {}, {}))
    found = diff_stores(a, open_store(b.url))
    assert (found.layers_only_in_a, found.layers_only_in_b) == ((1,), (5,))
    assert [(layer.layer, layer.rows, layer.bit_equal, layer.only_in_a) for layer in found.layers] == [(0, 4, 4, 9), (3, 13, 13, 0)]
    assert not found.is_equal


def test_identities_are_compared_field_by_field_and_do_not_decide(tmp_path: Path, toy: Any) -> None:
    numbers = {(key, layer): np.round(value(key, layer)) for key in KEYS for layer in (0, 3)}
    a = make(tmp_path / "a", toy, numbers=numbers)
    b = make(tmp_path / "b", toy, numbers=numbers, store_dtype="bf16-exact")
    found = diff_stores(a, b)
    assert found.is_equal
    assert [(field.name, field.a, field.b) for field in found.identity] == [("store_dtype", "float32", "bf16-exact")]
    assert "store_dtype is 'float32' in A" in shown(found)
    nested = list(differing_fields({"x": {"y": 1, "z": 2}}, {"x": {"y": 1, "z": 3}, "w": 0}))
    assert [(field.name, field.a, field.b) for field in nested] == [("w", None, 0), ("x.z", 2, 3)]


def test_each_unit_is_read_once_where_orders_agree(tmp_path: Path, toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = make(tmp_path / "a", toy, unit_rows=1), make(tmp_path / "b", toy, unit_rows=6)
    read: list[str] = []
    original = StoreReader.activations

    def counted(self: StoreReader, rows_N: Any, layers: Any) -> Any:
        read.append(Path(self.url).name)
        return original(self, rows_N, layers)

    monkeypatch.setattr(StoreReader, "activations", counted)
    told: list[int] = []
    assert diff_stores(a, b, progress=told.append).is_equal
    assert (read.count("a"), read.count("b")) == (13, 3)
    assert sum(told) == 26


def test_damage_is_an_error_and_no_difference(tmp_path: Path, toy: Any) -> None:
    a, b = make(tmp_path / "a", toy), make(tmp_path / "b", toy)
    (tmp_path / "b/activations/c/1/0/0").unlink()
    with pytest.raises(IntegrityError, match=r"/b: .*(000001|activations/c/1/0/0)"):
        diff_stores(a, b)


def test_relative_differences() -> None:
    a = np.array([[0, 0], [3, 4], [1, 0], [0, 0]], dtype=np.float32)
    b = np.array([[0, 0], [3, 4], [-1, 0], [2, 0]], dtype=np.float32)
    assert relative_differences(a, b).tolist() == [0, 0, 2, 1]
    assert relative_differences(b, a).tolist() == [0, 0, 2, 1]
