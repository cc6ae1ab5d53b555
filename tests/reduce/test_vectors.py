from __future__ import annotations

import numpy as np

from persona_ray.reduce.moments import Group, GroupMoments, Moments
from persona_ray.reduce.vectors import Filter, Vectors, select_vectors


def constant(count: int, value: float) -> GroupMoments:
    return GroupMoments(count, np.full((1, 2), value), np.zeros((1, 2)))


MOMENTS = Moments(
    {
        Group(0, -1): constant(2, 10.0),
        Group(0, 0): constant(2, 20.0),
        Group(1, 3): constant(3, 1.0),
        Group(1, 2): constant(1, 5.0),
        Group(1, -1): constant(6, 100.0),
        Group(2, 3): constant(1, 7.0),
        Group(2, 1): constant(9, 8.0),
    }
)


def select(min_score: int | None, min_count: int, default_codes: tuple[int, ...] = (0,)) -> Vectors:
    return select_vectors(MOMENTS, num_archetypes=4, default_codes=set(default_codes), keep=Filter(min_score, min_count))


def test_a_role_vector_is_the_mean_of_rows_that_pass() -> None:
    found = select(min_score=3, min_count=2)
    assert list(found.roles) == [1]
    np.testing.assert_array_equal(found.role_vectors, [[[1.0, 1.0]]])
    np.testing.assert_array_equal(found.count_A, [4, 3, 1, 0])


def test_a_lower_score_is_weighted_by_rows() -> None:
    found = select(min_score=2, min_count=1)
    np.testing.assert_array_equal(found.role_vectors[:, 0, 0], [(3 * 1.0 + 5.0) / 4, 7.0])


def test_unscored_rows_never_pass_a_judge_and_always_pass_without_one() -> None:
    assert select(min_score=0, min_count=1).count_A[1] == 4
    assert select(min_score=None, min_count=1).count_A[1] == 10


def test_the_default_takes_all_its_rows_whatever_their_score() -> None:
    found = select(min_score=3, min_count=50)
    np.testing.assert_array_equal(found.default_vector, [[15.0, 15.0]])
    assert found.count_A[0] == 4
    assert not found.roles


def test_several_defaults_are_one_vector_of_all_their_rows() -> None:
    found = select(min_score=3, min_count=1, default_codes=(0, 2))
    assert list(found.roles) == [1]
    np.testing.assert_allclose(found.default_vector[0], (4 * 15.0 + 7.0 + 9 * 8.0) / 14)
