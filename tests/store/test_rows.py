"""Picking rows and layers: whatever is asked for, the numbers are those of reading everything and indexing."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import zarr.storage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persona_ray.errors import InputError, IntegrityError
from persona_ray.spec import CapturedUnit, Judgement
from persona_ray.store.prepare import prepare_store
from persona_ray.store.reader import open_store
from persona_ray.store.scores import ScoreWriter, publish_scores
from persona_ray.store.writer import UnitWriter

NUM_ROWS, UNIT_ROWS, HIDDEN = 21, 4, 5
FIRST_LAYERS, FURTHER_LAYERS = (0, 3, 7), (1, 5)
LAYERS = FIRST_LAYERS + FURTHER_LAYERS
WHOLE = -1
REFUSED = {1: "empty answer", 12: "too long", 13: "too long"}
UNWRITTEN, WITHOUT_FURTHER = 4, 2
ROWS_N = [row for row in range(NUM_ROWS) if row not in REFUSED and row // UNIT_ROWS != UNWRITTEN]
ROWS_OF_ALL_N = [row for row in ROWS_N if row // UNIT_ROWS != WITHOUT_FURTHER]


def rounded(values: Any) -> Any:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def further(toy: Any, unit: int) -> Any:
    """(R, L, D) of the further layers."""
    shape = (len(toy.rollouts(unit)), len(FURTHER_LAYERS), HIDDEN)
    return np.random.default_rng([99, unit]).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module", params=["bf16-exact", "bfloat16"])
def filled(request: Any, make_toy: Any, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A store with refused rows, a unit without numbers, further layers that one unit lacks, and scores of some units."""
    folder = tmp_path_factory.mktemp("rows")
    toy = make_toy(rows=NUM_ROWS, unit_rows=UNIT_ROWS, layers=FIRST_LAYERS, hidden=HIDDEN, store_dtype=request.param)
    url = toy.prepare(folder)
    prepare_store(url, identity=toy.identity(), plan=toy.plan, job={}, layers=FURTHER_LAYERS)
    whole_NLD = np.full((NUM_ROWS, len(LAYERS), HIDDEN), np.nan, dtype=np.float32)
    for unit in toy.plan.units:
        texts = UnitWriter(url).write_rollouts(unit, toy.rollouts(unit))
        refused = {row: why for row, why in REFUSED.items() if row // UNIT_ROWS == unit}
        place = slice(unit * UNIT_ROWS, (unit + 1) * UNIT_ROWS)
        if unit != UNWRITTEN:
            UnitWriter(url).commit(toy.captured(unit, refused=refused))
            whole_NLD[place, : len(FIRST_LAYERS)] = rounded(toy.activations(unit))
        if unit not in {UNWRITTEN, WITHOUT_FURTHER}:
            values_RLD = further(toy, unit)
            values_RLD[np.array([row % UNIT_ROWS for row in refused], dtype=np.int64)] = np.nan
            UnitWriter(url, FURTHER_LAYERS).commit(CapturedUnit(unit, texts, values_RLD, refused, {}))
            whole_NLD[place, len(FIRST_LAYERS) :] = rounded(values_RLD)
    score_N = np.full(NUM_ROWS, -1)
    for unit in (0, 2, 5):
        judged = [Judgement(rollout.index % 4, "so") for rollout in toy.rollouts(unit)]
        ScoreWriter(url, "judge-1", {}).write(unit, toy.rollouts(unit), judged)
        score_N[unit * UNIT_ROWS :][: len(judged)] = [verdict.score for verdict in judged]
    publish_scores(url, "judge-1")
    return SimpleNamespace(url=url, toy=toy, store=open_store(url), whole_NLD=whole_NLD, score_N=score_N)


def columns_of(toy: Any, rows: list[int]) -> dict[str, list[Any]]:
    names = ("archetype", "system_prompt", "question", "sample", "turn")
    return {name: [getattr(toy.plan.keys[row], name) for row in rows] for name in names}


# ---- picking


def test_all_rows_are_those_that_are_stored(filled: SimpleNamespace) -> None:
    rows = filled.store.rows()
    assert rows.rollout_N.tolist() == ROWS_N
    assert (rows.layers, len(rows), rows.rollout_N.dtype) == (FIRST_LAYERS, len(ROWS_N), np.int64)
    assert filled.store.rows(LAYERS).rollout_N.tolist() == ROWS_OF_ALL_N
    assert filled.store.units() == (0, 1, 2, 3, 5)
    assert filled.store.units(LAYERS) == filled.store.units([1]) == (0, 1, 3, 5)
    expected = columns_of(filled.toy, ROWS_N)
    assert rows.archetype_names == expected.pop("archetype")
    assert {name: rows.columns[name].tolist() for name in expected} == expected
    assert {values.dtype for values in rows.columns.values()} == {np.dtype(np.int32)}
    assert repr(rows) == f"<14 rows x 3 layers of {filled.url}>"


WANTED: dict[str, st.SearchStrategy[Any]] = {
    "archetype": st.sampled_from(["default", "bard", "sage"]),
    "system_prompt": st.integers(0, 2),
    "question": st.integers(0, 7),
    "sample": st.integers(0, 3),
    "turn": st.integers(0, 2),
    "score": st.integers(-1, 3),
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=st.fixed_dictionaries({}, optional={name: one | st.lists(one, max_size=3) for name, one in WANTED.items()}))
def test_where_is_the_loop_that_one_would_write(filled: SimpleNamespace, wanted: dict[str, Any]) -> None:
    columns = columns_of(filled.toy, ROWS_N) | {"score": filled.score_N[ROWS_N].tolist()}
    allowed = {name: values if isinstance(values, list) else [values] for name, values in wanted.items()}
    expected = [row for i, row in enumerate(ROWS_N) if all(columns[name][i] in values for name, values in allowed.items())]
    found = filled.store.select(**wanted)
    assert found.rollout_N.tolist() == expected
    assert found.archetype_names == columns_of(filled.toy, expected)["archetype"]
    step_by_step = filled.store.rows()
    for name, values in wanted.items():
        step_by_step = step_by_step.where(**{name: values})
    assert step_by_step.rollout_N.tolist() == expected


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    places=st.lists(st.integers(0, len(ROWS_OF_ALL_N) - 1), max_size=20),
    layers=st.lists(st.sampled_from(LAYERS), max_size=7),
)
def test_any_picking_gives_the_numbers_of_reading_everything(filled: SimpleNamespace, places: list[int], layers: list[int]) -> None:
    """Layers in any order, of both sets, some twice."""
    picked = filled.store.rows(LAYERS).pick(places)
    rows = [ROWS_OF_ALL_N[place] for place in sorted(set(places))]
    assert picked.rollout_N.tolist() == rows
    expected_NLD = filled.whole_NLD[rows][:, [LAYERS.index(layer) for layer in layers]]
    found_NLD = picked.activations(layers)
    assert found_NLD.dtype == np.float32
    np.testing.assert_array_equal(found_NLD, expected_NLD)
    for layer in set(layers):
        np.testing.assert_array_equal(picked.layer(layer), filled.whole_NLD[rows, LAYERS.index(layer)])
    parts = list(picked.stream(layers))
    assert [row for part in parts for row in part.rollout_R.tolist()] == rows
    assert [score for part in parts for score in part.score_R.tolist()] == filled.score_N[rows].tolist()
    assert [code for part in parts for code in part.archetype_R.tolist()] == picked.columns["archetype"].tolist()
    np.testing.assert_array_equal(np.concatenate([expected_NLD[:0], *(part.activations_RLD for part in parts)]), expected_NLD)
    assert [text.index for text in picked.rollouts()] == rows
    assert picked.scores().tolist() == filled.score_N[rows].tolist()


@pytest.mark.parametrize("layer", LAYERS)
def test_one_layer_of_all_rows_is_the_layer_of_all_rows(filled: SimpleNamespace, layer: int) -> None:
    rows_N, values_ND = filled.store.layer(layer)
    rows = ROWS_N if layer in FIRST_LAYERS else ROWS_OF_ALL_N
    assert rows_N.tolist() == rows
    np.testing.assert_array_equal(values_ND, filled.store.rows([layer]).activations([layer])[:, 0])
    np.testing.assert_array_equal(values_ND, filled.whole_NLD[rows, LAYERS.index(layer)])


def test_places_may_be_a_mask(filled: SimpleNamespace) -> None:
    rows = filled.store.rows()
    is_sage_N = np.array([name == "sage" for name in rows.archetype_names])
    assert rows.pick(is_sage_N).rollout_N.tolist() == rows.where(archetype="sage").rollout_N.tolist()
    assert rows.pick(is_sage_N.tolist()).rollout_N.tolist() == rows.pick(np.flatnonzero(is_sage_N)).rollout_N.tolist()
    assert len(rows.pick([])) == len(rows.pick([]).pick(np.zeros(0, dtype=bool))) == 0


@pytest.mark.parametrize("places", [[-1], [0, 14], [0.5], [True], [True] * 15, ["0"], np.array([2**63], dtype=np.uint64)])
def test_places_that_are_not_there_are_refused(filled: SimpleNamespace, places: Any) -> None:
    with pytest.raises(InputError, match=r"places are whole numbers from 0 to 13, or a mask of 14 bools"):
        filled.store.rows().pick(places)


def test_what_is_not_known_is_said_in_one_line(filled: SimpleNamespace, make_toy: Any, tmp_path: Path) -> None:
    rows = filled.store.rows()
    unscored = open_store(make_toy().fill(tmp_path))
    asked: dict[str, Callable[[], object]] = {
        "no archetype 'jester'; there are default, bard, sage": lambda: rows.where(archetype=["bard", "jester"]),
        "no archetype 2; there are default, bard, sage": lambda: rows.where(archetype=2),
        "layer 2 was not captured; there are [0, 1, 3, 5, 7]": lambda: rows.layer(2),
        "layer 9 was not captured; there are [0, 1, 3, 5, 7] ": lambda: filled.store.rows([0, 9]),
        "layer 4 was not captured": lambda: rows.to_torch([4]),
        "layer 6 was not captured": lambda: list(rows.stream([6])),
        "no judge has scored these rows, so none can be picked by score": lambda: unscored.rows().where(score=3),
    }
    for words, ask in asked.items():
        with pytest.raises(InputError) as caught:
            ask()
        assert words.strip() in str(caught.value)
        assert "\n" not in str(caught.value)
    assert unscored.rows().scores().tolist() == [-1] * 10


def test_rows_of_a_unit_that_lacks_the_layers_are_never_made_up(filled: SimpleNamespace) -> None:
    """Picked for the store's first layers, then asked for a layer that some of them do not have."""
    with pytest.raises(IntegrityError, match=r"hold NaN or Inf \(first: row 8, unit 000002\)"):
        filled.store.rows().layer(1)
    with pytest.raises(IntegrityError, match=r"4 of 14 picked rows have no activations of layers \[1\]; pick rows that have them"):
        list(filled.store.rows().stream([1]))


def test_rows_that_went_while_they_were_streamed_are_missed(toy: Any, tmp_path: Path) -> None:
    rows = open_store(toy.fill(tmp_path)).rows()
    (tmp_path / "_commits/000001.json").unlink()
    fresh = open_store(str(tmp_path)).rows()
    assert [part.rollout_R.tolist() for part in fresh.stream()] == [[0, 1, 2, 3], [8, 9]]
    parts = rows.pick([0, 9]).stream()
    assert [part.rollout_R.tolist() for part in parts] == [[0], [9]]


def test_rows_travel(filled: SimpleNamespace) -> None:
    picked = pickle.loads(pickle.dumps(filled.store.select(archetype="bard")))
    np.testing.assert_array_equal(picked.activations(), filled.store.select(archetype="bard").activations())


# ---- for other libraries


def test_to_torch(filled: SimpleNamespace) -> None:
    import torch

    rows = filled.store.select(archetype="sage")
    found = rows.to_torch([7, 0])
    assert (found.dtype, tuple(found.shape), found.device.type) == (torch.float32, (len(rows), 2, HIDDEN), "cpu")
    np.testing.assert_array_equal(found.numpy(), filled.whole_NLD[rows.rollout_N][:, [2, 0]])
    found += 1  # it is the caller's own
    np.testing.assert_array_equal(rows.activations([7, 0]), filled.whole_NLD[rows.rollout_N][:, [2, 0]])


def test_to_xarray(filled: SimpleNamespace) -> None:
    rows = filled.store.rows(LAYERS).where(archetype=["sage", "default"])
    dataset = rows.to_xarray([5, 0, 3])
    assert dataset["activations"].dims == ("rollout", "layer", "hidden")
    np.testing.assert_array_equal(dataset["activations"].values, filled.whole_NLD[rows.rollout_N][:, [4, 0, 1]])
    assert dataset["rollout"].values.tolist() == rows.rollout_N.tolist()
    assert dataset["layer"].values.tolist() == [5, 0, 3]
    assert dataset["layer"].attrs["alias_transformerlens"] == "blocks.{l}.hook_resid_post"
    np.testing.assert_array_equal(dataset.sel(layer=0, rollout=2)["activations"], filled.whole_NLD[2, 0])
    assert dataset["score"].values.tolist() == filled.score_N[rows.rollout_N].tolist()
    assert set(dataset.coords) == {"rollout", "layer", "archetype", "system_prompt", "question", "sample", "turn"}
    for name, values in rows.columns.items():
        assert dataset[name].values.tolist() == values.tolist()
    flags = dataset["archetype"].attrs
    names = dict(zip(flags["flag_values"], flags["flag_meanings"].split(), strict=True))
    assert [names[code] for code in dataset["archetype"].values.tolist()] == rows.archetype_names
    assert dataset.attrs == {"store": filled.url}


def test_nothing_at_all_has_a_shape_too(filled: SimpleNamespace) -> None:
    nothing = filled.store.select(question=99)
    assert nothing.activations().shape == nothing.to_xarray()["activations"].shape == (0, 3, HIDDEN)
    assert nothing.layer(0).shape == (0, HIDDEN)
    assert (list(nothing.stream()), list(nothing.rollouts()), nothing.scores().tolist()) == ([], [], [])
    assert filled.store.rows().activations([]).shape == (14, 0, HIDDEN)


@pytest.mark.parametrize(("package", "ask", "extra"), [("torch", "to_torch", "engine"), ("xarray", "to_xarray", "readers")])
def test_without_a_library_one_line_says_what_to_install(filled: SimpleNamespace, package: str, ask: str, extra: str) -> None:
    code = f"""
import sys
sys.modules[{package!r}] = None
import persona_ray
from persona_ray.errors import InputError
rows = persona_ray.open_store({filled.url!r}).rows()
assert rows.activations().shape == (14, 3, 5)
try:
    rows.{ask}()
except InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == f"{package} is not installed; pip install 'persona-ray[{extra}]', or take numpy from activations()\n", done.stderr


# ---- what it costs


class Counted(zarr.storage.WrapperStore[Any]):
    """A place that keeps a list of what was asked of it."""

    def __init__(self, store: Any, asked: list[tuple[str, bool]]) -> None:
        super().__init__(store)
        self.asked = asked

    def _with_store(self, store: Any) -> Counted:
        return Counted(store, self.asked)

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        """Noted as key, and whether the whole object was wanted."""
        self.asked.append((key, byte_range is None))
        return await super().get(key, prototype, byte_range)


@pytest.mark.parametrize(
    ("layers", "of_set"),
    [((3,), [1]), ((7, 0), [WHOLE]), ((1,), [0, 1]), ((5, 0, 3), [WHOLE, 1]), ((3, 3), [1])],
)
def test_requests_are_those_of_the_layers_that_are_asked_for(filled: SimpleNamespace, layers: tuple[int, ...], of_set: list[int]) -> None:
    """For each unit that rows are picked from, and each set of layers: the shard's index, and a part of it for each layer.

    requests = sum over sets with a layer asked for of units x (1 + layers of the set), or units where more than half of the
    set's layers are asked for, and objects are read whole; no metadata, and no other unit.
    """
    store = open_store(filled.url)
    asked: list[tuple[str, bool]] = []
    place, get = store._backend.zarr_store(), store._backend.get
    whole: list[str] = []
    store._backend.get = lambda key: (whole.append(key), get(key))[1]  # type: ignore[method-assign]
    store._backend.zarr_store = lambda: Counted(place, asked)  # type: ignore[method-assign]
    rows = store.rows(LAYERS)
    for picked, num_units in ((rows, 4), (rows.pick([0, 1, len(rows) - 1]), 2), (rows.pick([]), 0)):
        assert asked == []
        whole.clear()
        picked.activations(layers)
        assert len(asked) == num_units * sum(1 + num_layers for num_layers in of_set if num_layers > 0)
        assert len(whole) == num_units * of_set.count(WHOLE)
        assert not any(is_whole for _, is_whole in asked)
        assert len({key for key, _ in asked}) == num_units * sum(num_layers > 0 for num_layers in of_set)
        asked.clear()


def test_streaming_is_one_request_for_a_unit(filled: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one for its scores: whole objects."""
    store = open_store(filled.url)
    rows = store.rows().pick([0, 1, len(ROWS_N) - 1])
    asked: list[str] = []
    get = type(store._backend).get_or_none
    monkeypatch.setattr(type(store._backend), "get_or_none", lambda self, key: asked.append(key) or get(self, key))
    assert len(list(rows.stream())) == 2
    of_units = [f"{name}/c/{unit}{end}" for unit in (0, 5) for name, end in (("activations", "/0/0"), ("scores/judge-1/score", ""))]
    assert sorted(asked) == sorted(["scores/latest.json", *of_units])
