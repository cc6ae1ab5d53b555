from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_ray.reduce.massive import MASSIVE_TIMES, facts, massive_dims, massive_share, participation


def vectors(times: float) -> np.ndarray:
    """Ten vectors of two layers whose dims are of size 1, but for dim 3 of the second."""
    vectors_ALD = np.sign(np.random.default_rng(0).standard_normal((10, 2, 8)))
    vectors_ALD[:, 1, 3] *= times
    return vectors_ALD


@pytest.mark.parametrize("times", [MASSIVE_TIMES, 1000.0])
def test_a_dim_that_stands_out_is_named_with_its_size(times: float) -> None:
    massive = massive_dims(vectors(times))
    assert [massive.named(place) for place in range(2)] == [{}, {"3": times}]


def test_one_that_is_only_large_is_not() -> None:
    assert not massive_dims(vectors(MASSIVE_TIMES * 0.99)).is_massive_LD.any()


def test_the_share_of_the_axis_in_massive_dims() -> None:
    axis_LD = np.ones((2, 8))
    axis_LD[1, 3] = 3.0
    np.testing.assert_allclose(massive_share(axis_LD, massive_dims(vectors(100.0))), [0.0, 9 / 16])


@given(number=st.integers(1, 8), scale=st.floats(1e-3, 1e3))
def test_an_axis_of_equal_dims_is_carried_by_all_of_them(number: int, scale: float) -> None:
    axis_LD = np.zeros((1, 8))
    axis_LD[0, :number] = scale
    np.testing.assert_allclose(participation(axis_LD), [number])


def test_a_layer_of_zeros_has_no_facts_that_cannot_be_written_down() -> None:
    zeros = facts(np.zeros((1, 4)), massive_dims(np.zeros((3, 1, 4))))
    assert zeros == {"massive_dims": [{}], "axis_share_of_massive_dims": [0.0], "axis_participation": [0.0]}
