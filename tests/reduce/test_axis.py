from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_ray.reduce.axis import assistant_axis, best_layer, projections, separation
from persona_ray.reduce.moments import GroupMoments


def test_the_axis_counts_every_archetype_once_and_points_to_the_default() -> None:
    default_LD = np.array([[4.0, 0.0]])
    role_ALD = np.array([[[0.0, 2.0]], [[2.0, 0.0]]])
    axis_LD = assistant_axis(default_LD, role_ALD)
    np.testing.assert_array_equal(axis_LD, [[3.0, -1.0]])
    assert projections(default_LD[None], axis_LD)[0, 0] > projections(role_ALD, axis_LD).mean()


@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 100))
def test_projections_do_not_depend_on_the_length_of_the_axis(seed: int, scale: float) -> None:
    generator = np.random.default_rng(seed)
    vectors_ALD, axis_LD = generator.standard_normal((3, 2, 5)), generator.standard_normal((2, 5))
    np.testing.assert_allclose(projections(vectors_ALD, axis_LD), projections(vectors_ALD, scale * axis_LD), atol=1e-12)


def test_the_axis_projects_to_its_own_length_and_a_zero_axis_to_zero() -> None:
    axis_LD = np.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(projections(axis_LD[None], axis_LD), [[5.0, 0.0]])


def test_separation_is_distance_over_the_spread_of_rows_along_the_axis() -> None:
    axis_LD = np.array([[6.0, 0.0], [0.0, 0.0]])
    # Variance 4 along the axis, 100 across it: only the first may count.
    group = GroupMoments(5, np.zeros((2, 2)), np.array([[16.0, 400.0], [1.0, 1.0]]))
    found_L = separation(axis_LD, [group])
    assert found_L[0] == pytest.approx(6.0 / 2.0)
    assert np.isnan(found_L[1])


def test_separation_agrees_with_rows_drawn_from_a_known_gap() -> None:
    generator = np.random.default_rng(1)
    sigma_D = np.array([1.0, 2.0, 0.5, 3.0])
    means = [np.array([3.0, 0.0, 0.0, 1.0]), np.zeros(4), np.array([0.0, 1.0, 0.0, 0.0])]
    rows = [(generator.standard_normal((4000, 1, 4)) * sigma_D + mean) for mean in means]
    groups = [GroupMoments.of(values.astype(np.float32)) for values in rows]
    axis_LD = assistant_axis(groups[0].mean_LD, np.stack([group.mean_LD for group in groups[1:]]))
    along = [projections(values, axis_LD)[:, 0] for values in rows]
    pooled = np.sqrt(np.mean([values.var() for values in along]))
    expected = (along[0].mean() - np.mean([values.mean() for values in along[1:]])) / pooled
    assert separation(axis_LD, groups)[0] == pytest.approx(expected, rel=0.05)


def test_separation_is_unknown_with_one_row_each() -> None:
    assert np.isnan(separation(np.ones((2, 3)), [GroupMoments(1, np.zeros((2, 3)), np.zeros((2, 3)))])).all()


@pytest.mark.parametrize(
    ("separation_L", "expected"),
    [
        ([1.0, 3.0, 2.0], 10),
        ([1.0, 2.0, 9.0], 10),
        ([1.0, np.nan, 9.0], 5),
        ([np.nan, np.nan, np.nan], 10),
    ],
)
def test_the_best_layer_is_a_decoder_block_with_a_reason(separation_L: list[float], expected: int) -> None:
    layer, reason = best_layer(np.array(separation_L), [5, 10, 15])
    assert layer == expected
    assert f"layer {expected}" in reason


def test_the_only_layer_is_the_best() -> None:
    assert best_layer(np.array([0.5]), [7]) == (7, "layer 7 is the only one that was captured")
