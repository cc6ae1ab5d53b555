from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_ray.errors import IntegrityError, NothingUsableError
from persona_ray.reduce.merging import in_process, merge_all
from persona_ray.reduce.moments import Group, Moments
from persona_ray.spec import Float32, ScoredRows

LAYERS, WIDTH = 2, 3


def rows_of(archetypes: list[int], scores: list[int], activations_RLD: Float32) -> ScoredRows:
    return ScoredRows(
        rollout_R=np.arange(len(archetypes), dtype=np.int64),
        archetype_R=np.array(archetypes, np.int32),
        score_R=np.array(scores, np.int8),
        activations_RLD=activations_RLD,
    )


def subset(rows: ScoredRows, members: list[int]) -> ScoredRows:
    picked = np.array(members, np.int64)
    return ScoredRows(rows.rollout_R[picked], rows.archetype_R[picked], rows.score_R[picked], rows.activations_RLD[picked])


def assert_same(a: Moments, b: Moments, scale: float = 1.0) -> None:
    assert set(a.groups) == set(b.groups)
    for group, expected in b.groups.items():
        found = a.groups[group]
        assert found.count == expected.count
        np.testing.assert_allclose(found.mean_LD, expected.mean_LD, rtol=1e-12, atol=1e-13 * scale)
        np.testing.assert_allclose(found.m2_LD, expected.m2_LD, rtol=1e-9, atol=1e-11 * scale**2)


@st.composite
def many_rows(draw: st.DrawFn) -> ScoredRows:
    number = draw(st.integers(1, 24))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # A large common offset is what makes a naive sum of squares fail.
    offset = draw(st.sampled_from([0.0, 100.0, -3000.0]))
    return rows_of(
        draw(st.lists(st.integers(0, 3), min_size=number, max_size=number)),
        draw(st.lists(st.integers(-1, 3), min_size=number, max_size=number)),
        (generator.standard_normal((number, LAYERS, WIDTH)) + offset).astype(np.float32),
    )


def test_one_unit_has_the_moments_that_numpy_gives() -> None:
    generator = np.random.default_rng(0)
    activations_RLD = generator.standard_normal((6, LAYERS, WIDTH)).astype(np.float32)
    moments = Moments.of(rows_of([0, 1, 0, 1, 0, 0], [3, 3, 3, -1, 2, 3], activations_RLD))
    assert {group: found.count for group, found in moments.groups.items()} == {
        Group(0, 3): 3,
        Group(0, 2): 1,
        Group(1, 3): 1,
        Group(1, -1): 1,
    }
    members_RLD = activations_RLD[[0, 2, 5]].astype(np.float64)
    found = moments.groups[Group(0, 3)]
    np.testing.assert_allclose(found.mean_LD, members_RLD.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(found.m2_LD, members_RLD.var(axis=0) * 3, rtol=1e-12)
    assert found.mean_LD.dtype == np.float64
    assert moments.num_rows == 6


@settings(deadline=None)
@given(rows=many_rows(), data=st.data())
def test_any_split_merged_in_any_order_equals_one_pass(rows: ScoredRows, data: st.DataObject) -> None:
    number = len(rows.rollout_R)
    order = data.draw(st.permutations(range(number)))
    borders = sorted(data.draw(st.lists(st.integers(0, number), max_size=5)))
    pieces = [order[start:end] for start, end in zip([0, *borders], [*borders, number], strict=True)]
    scale = float(np.abs(rows.activations_RLD).max())
    assert_same(merge_all(Moments.of(subset(rows, piece)) for piece in pieces), Moments.of(rows), scale)


@settings(deadline=None)
@given(rows=many_rows())
def test_merging_commutes_and_nothing_changes_nothing(rows: ScoredRows) -> None:
    half = len(rows.rollout_R) // 2
    a, b = Moments.of(subset(rows, list(range(half)))), Moments.of(subset(rows, list(range(half, len(rows.rollout_R)))))
    assert_same(a.merge(b), b.merge(a), float(np.abs(rows.activations_RLD).max()))
    assert_same(a.merge(Moments({})), a, 0.0)
    assert_same(Moments({}).merge(a), a, 0.0)


@given(number=st.integers(1, 40), exponent=st.integers(0, 5))
def test_runs_of_a_power_of_two_are_nodes_of_the_tree(number: int, exponent: int) -> None:
    generator = np.random.default_rng(number)
    leaves = [Moments.of(rows_of([0, 1], [3, 3], generator.standard_normal((2, LAYERS, WIDTH)).astype(np.float32))) for _ in range(number)]
    size = 2**exponent
    in_slices = merge_all(merge_all(leaves[start : start + size]) for start in range(0, number, size))
    at_once = merge_all(leaves)
    for group, expected in at_once.groups.items():
        assert (in_slices.groups[group].mean_LD == expected.mean_LD).all()
        assert (in_slices.groups[group].m2_LD == expected.m2_LD).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_named(value: float) -> None:
    activations_RLD = np.zeros((3, LAYERS, WIDTH), np.float32)
    activations_RLD[1, 1, 2] = value
    with pytest.raises(IntegrityError, match=r"row 1 .*position 1 in the layer dim.*1 of the 3 rows"):
        Moments.of(rows_of([0, 0, 0], [3, 3, 3], activations_RLD))


def test_padding_is_refused() -> None:
    with pytest.raises(IntegrityError, match="row 1 is padding"):
        Moments.of(rows_of([0, -1], [3, -1], np.zeros((2, LAYERS, WIDTH), np.float32)))


def test_other_shapes_are_refused() -> None:
    a = Moments.of(rows_of([0], [3], np.zeros((1, 2, 3), np.float32)))
    b = Moments.of(rows_of([0], [3], np.zeros((1, 2, 4), np.float32)))
    with pytest.raises(IntegrityError, match=r"\(2, 3\).*\(2, 4\)"):
        a.merge(b)


def test_no_units_is_an_error_in_words() -> None:
    with pytest.raises(NothingUsableError, match="not one unit"):
        in_process(lambda units: iter(()), [], Moments.of)


def test_progress_hears_of_every_unit() -> None:
    told: list[int] = []
    unit = rows_of([0], [3], np.ones((1, LAYERS, WIDTH), np.float32))
    moments = in_process(lambda units: iter([unit for _ in units]), [4, 5, 6], Moments.of, told.append)
    assert sum(told) == 3
    assert moments.num_rows == 3
