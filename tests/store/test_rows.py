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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persona_ray.errors import InputError, IntegrityError
from persona_ray.spec import CapturedUnit, Judgement
from persona_ray.store.folder import FolderBackend
from persona_ray.store.prepare import prepare_store
from persona_ray.store.reader import open_store
from persona_ray.store.scores import ScoreWriter, publish_scores
from persona_ray.store.writer import UnitWriter

NUM_ROWS, UNIT_ROWS, HIDDEN = 21, 4, 5
FIRST_LAYERS, FURTHER_LAYERS = (0, 3, 7), (1, 5)
LAYERS = FIRST_LAYERS + FURTHER_LAYERS
WHOLE, PART = "get_or_none", "part_or_none"
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
    with pytest.raises(IntegrityError, match=r"unit 000002 \(row 8\) is not committed with layers \[1\]; pick rows that have them"):
        filled.store.rows().layer(1)
    with pytest.raises(IntegrityError, match=r"4 of 14 picked rows have no activations of layers \[1\]; pick rows that have them"):
        list(filled.store.rows().stream([1]))


def test_numbers_whose_marker_is_not_there_are_never_read(toy: Any, tmp_path: Path) -> None:
    """Picked before their unit was requeued, or written by somebody who has not committed yet."""
    rows = open_store(toy.fill(tmp_path)).rows()
    (tmp_path / "_commits/000001.json").unlink()
    fresh = open_store(str(tmp_path))
    for layers in ([3], [0, 3]):
        with pytest.raises(IntegrityError, match=r"unit 000001 \(row 4\) is not committed with layers"):
            fresh.activations(rows.rollout_N, layers)
        assert fresh.activations(rows.rollout_N[:4], layers).shape == (4, len(layers), 6)


def test_rows_that_are_refused_have_no_numbers(toy: Any, tmp_path: Path) -> None:
    store = open_store(toy.fill(tmp_path, refused={5: "empty answer"}))
    for layers in ([3], [0, 3]):
        with pytest.raises(IntegrityError, match=r"1 committed rows hold NaN or Inf \(first: row 5, unit 000001\)"):
            store.activations(np.array([0, 4, 5, 6]), layers)


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


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What folders are asked for: how, and the key."""
    seen: list[tuple[str, str]] = []

    def listen(kind: str, method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, key, *rest: seen.append((kind, key)) or method(self, key, *rest)

    for kind in (WHOLE, PART):
        monkeypatch.setattr(FolderBackend, kind, listen(kind, getattr(FolderBackend, kind)))
    return seen


@pytest.mark.parametrize(
    ("layers", "kinds"),
    [
        ((3,), {"activations": PART}),
        ((3, 3), {"activations": PART}),
        ((7, 0), {"activations": WHOLE}),
        ((1,), {"activations_1": PART}),
        ((0, 1), {"activations": PART, "activations_1": PART}),
        ((5, 0, 3), {"activations": WHOLE, "activations_1": PART}),
    ],
)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_requests_are_those_of_the_layers_that_are_asked_for(
    filled: SimpleNamespace, asked: list[tuple[str, str]], layers: tuple[int, ...], kinds: dict[str, str], is_streamed: bool
) -> None:
    """For each unit that rows are picked from, and each set of layers: of its object the layer, and the first time its index.

    Or the whole of it, where more than half of the set's layers are asked for. No metadata, no marker again, and no other unit.
    """
    rows = open_store(filled.url).rows(LAYERS)
    unseen = {0, 1, 3, 5}
    for picked, units in ((rows, [0, 1, 3, 5]), (rows.pick([0, 1, len(rows) - 1]), [0, 5]), (rows.pick([]), [])):
        asked.clear()
        found_NLD = np.concatenate([part.activations_RLD for part in picked.stream(layers)] or [np.empty((0, len(layers), HIDDEN))])
        if not is_streamed:
            asked.clear()
            found_NLD = picked.activations(layers)
        np.testing.assert_array_equal(found_NLD, filled.whole_NLD[picked.rollout_N][:, [LAYERS.index(layer) for layer in layers]])
        expected = [
            (kind, f"{name}/c/{unit}/0/0")
            for name, kind in kinds.items()
            for unit in units
            for _ in range(2 if kind == PART and is_streamed and unit in unseen else 1)
        ]
        assert sorted(request for request in asked if not request[1].startswith("scores/")) == sorted(expected)
        unseen = set()


def test_streaming_is_one_request_for_a_unit(filled: SimpleNamespace, asked: list[tuple[str, str]]) -> None:
    """And one for its scores: whole objects."""
    rows = open_store(filled.url).rows().pick([0, 1, len(ROWS_N) - 1])
    asked.clear()
    assert len(list(rows.stream())) == 2
    of_units = [f"{name}/c/{unit}{end}" for unit in (0, 5) for name, end in (("activations", "/0/0"), ("scores/judge-1/score", ""))]
    assert sorted(asked) == sorted((WHOLE, key) for key in ["scores/latest.json", *of_units])
