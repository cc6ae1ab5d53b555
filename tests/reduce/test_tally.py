from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_ray.errors import IntegrityError
from persona_ray.reduce.moments import Group, GroupMoments, Moments
from persona_ray.reduce.tally import Moved, Tally
from persona_ray.spec import ScoredRows

LAYERS, WIDTH = 2, 3


def rows_of(archetypes: list[int], scores: list[int], seed: int) -> ScoredRows:
    values_RLD = np.random.default_rng(seed).standard_normal((len(archetypes), LAYERS, WIDTH)) + 30
    return ScoredRows(
        np.arange(len(archetypes), dtype=np.int64) * 3,
        np.array(archetypes, np.int32),
        np.array(scores, np.int8),
        values_RLD.astype(np.float32),
    )


def with_scores(rows: ScoredRows, score_R: np.ndarray) -> ScoredRows:
    return ScoredRows(rows.rollout_R, rows.archetype_R, score_R, rows.activations_RLD)


def assert_same(a: Moments, b: Moments) -> None:
    assert set(a.groups) == set(b.groups)
    for group, expected in b.groups.items():
        found = a.groups[group]
        assert found.count == expected.count
        np.testing.assert_allclose(found.mean_LD, expected.mean_LD, rtol=1e-11)
        np.testing.assert_allclose(found.m2_LD, expected.m2_LD, rtol=1e-8, atol=1e-9)


judged = st.integers(1, 30).flatmap(
    lambda number: st.tuples(
        st.lists(st.integers(0, 2), min_size=number, max_size=number),
        st.lists(st.integers(-1, 3), min_size=number, max_size=number),
        st.lists(st.integers(-1, 3), min_size=number, max_size=number),
    )
)


@given(rows=judged, seed=st.integers(0, 2**16))
def test_another_judging_equals_having_read_with_it(rows: tuple[list[int], list[int], list[int]], seed: int) -> None:
    archetypes, before, after = rows
    read = rows_of(archetypes, before, seed)
    tally, score_N = Tally.of(read), np.array(after, np.int8)
    rescoring = tally.rescoring(score_N)
    found = tally.rescored(score_N, rescoring, Moved.of(read, rescoring))
    assert_same(found.moments, Moments.of(with_scores(read, score_N)))
    np.testing.assert_array_equal(found.score_N, score_N)


@given(rows=judged, seed=st.integers(0, 2**16))
def test_parts_of_what_moves_merge(rows: tuple[list[int], list[int], list[int]], seed: int) -> None:
    archetypes, before, after = rows
    read = rows_of(archetypes, before, seed)
    rescoring = Tally.of(read).rescoring(np.array(after, np.int8))
    half = len(archetypes) // 2
    parts = [
        ScoredRows(read.rollout_R[part], read.archetype_R[part], read.score_R[part], read.activations_RLD[part])
        for part in (slice(0, half), slice(half, None))
    ]
    merged = Moved.of(parts[0], rescoring).merge(Moved.of(parts[1], rescoring))
    whole = Moved.of(read, rescoring)
    assert_same(merged.leaving, whole.leaving)
    assert_same(merged.arriving, whole.arriving)


def test_a_judge_who_scores_all_rows_of_a_group_alike_costs_no_reading() -> None:
    tally = Tally.of(rows_of([0, 0, 1, 1], [-1, -1, -1, -1], 0))
    rescoring = tally.rescoring(np.array([3, 3, 0, 0], np.int8))
    assert len(rescoring.rollout_M) == 0
    assert rescoring.renamed == {Group(0, -1): Group(0, 3), Group(1, -1): Group(1, 0)}


def test_only_the_minority_is_read_again() -> None:
    tally = Tally.of(rows_of([0] * 5, [3] * 5, 0))
    assert tally.rescoring(np.array([3, 3, 2, 3, 1], np.int8)).rollout_M.tolist() == [6, 12]


@given(rows=judged, seed=st.integers(0, 2**16))
def test_arrays_hold_everything(rows: tuple[list[int], list[int], list[int]], seed: int) -> None:
    tally = Tally.of(rows_of(rows[0], rows[1], seed))
    again = Tally.from_arrays(tally.arrays())
    assert_same(again.moments, tally.moments)
    for name in ("rollout_N", "archetype_N", "score_N"):
        np.testing.assert_array_equal(getattr(again, name), getattr(tally, name))


@given(first=st.integers(1, 9), second=st.integers(1, 9), seed=st.integers(0, 2**16))
def test_taking_out_reverses_merging(first: int, second: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    kept, gone = (GroupMoments.of(generator.standard_normal((number, LAYERS, WIDTH)).astype(np.float32) + 30) for number in (first, second))
    left = kept.merge(gone).without(gone)
    assert left.count == kept.count
    np.testing.assert_allclose(left.mean_LD, kept.mean_LD, rtol=1e-11)
    np.testing.assert_allclose(left.m2_LD, kept.m2_LD, atol=1e-9)


def test_rows_that_are_not_there_cannot_be_taken_out() -> None:
    few, many = (Moments.of(rows_of([0] * number, [3] * number, 0)) for number in (2, 3))
    other = Moments.of(rows_of([1], [3], 0))
    assert few.without(few).groups == {}
    for impossible in (many, other):
        with pytest.raises(IntegrityError, match="taken out"):
            few.without(impossible)
