"""What must hold of any two sets of directions or numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from persona_ray.reduce.compare import coordinates, cosines, pearson, positions, principal_angles, ranks, same_depth, spearman
from persona_ray.spec import Float64

SEEDS = st.integers(0, 2**32 - 1)
NUMBERS = arrays(np.float64, st.integers(3, 12), elements=st.floats(-1e6, 1e6, width=32))
SCALES = st.floats(1e-3, 1e3)


def rotation(random: np.random.Generator, size: int) -> Float64:
    turned: Float64 = np.linalg.qr(random.normal(size=(size, size)))[0]
    return turned


@given(SEEDS, st.integers(1, 4), SCALES)
def test_angles_and_cosines_do_not_depend_on_the_dims_the_lengths_or_the_signs(seed: int, num: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    one_KD, other_KD = random.normal(size=(2, num, 9))
    turn_DD, sign_K1 = rotation(random, 9), random.choice([-1.0, 1.0], size=(num, 1))
    angles_K = principal_angles(one_KD, other_KD)
    np.testing.assert_allclose(principal_angles(one_KD @ turn_DD * scale * sign_K1, other_KD @ turn_DD), angles_K, atol=1e-6)
    np.testing.assert_allclose(principal_angles(other_KD, one_KD), angles_K, atol=1e-6)
    # Any basis of the same subspace.
    np.testing.assert_allclose(principal_angles(rotation(random, num) @ one_KD, other_KD), angles_K, atol=1e-6)
    assert np.all(np.diff(angles_K) >= -1e-9)
    turned_K = cosines(one_KD @ turn_DD * scale * sign_K1, other_KD @ turn_DD)
    np.testing.assert_allclose(turned_K, cosines(one_KD, other_KD) * sign_K1[:, 0], atol=1e-12)


@given(SEEDS, st.integers(1, 5))
def test_equal_subspaces_are_at_0_degrees_to_rounding_and_orthogonal_ones_at_90(seed: int, num: int) -> None:
    turn_DD = rotation(np.random.default_rng(seed), 10)
    np.testing.assert_allclose(principal_angles(turn_DD[:num], turn_DD[:num]), 0, atol=1e-12)
    np.testing.assert_allclose(principal_angles(turn_DD[:num], turn_DD[num : 2 * num]), 90)
    np.testing.assert_allclose(cosines(turn_DD[:num], turn_DD[:num]), 1)


@pytest.mark.parametrize("degrees", [1e-7, 1e-3, 1.0, 30.0, 60.0, 89.999999])
def test_a_planted_angle_is_found_also_a_tiny_one(degrees: float) -> None:
    one_KD = np.eye(5)[:2]
    other_KD = one_KD.copy()
    other_KD[0, [0, 4]] = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    np.testing.assert_allclose(principal_angles(one_KD, other_KD), [0, degrees], rtol=1e-8, atol=1e-14)


def test_a_direction_that_is_0_has_no_cosine() -> None:
    assert np.isnan(cosines(np.zeros((1, 3)), np.ones((1, 3))))[0]


@given(NUMBERS, SEEDS, SCALES, st.floats(-1e3, 1e3))
def test_correlations_do_not_depend_on_units_or_order(values_N: Float64, seed: int, scale: float, offset: float) -> None:
    random = np.random.default_rng(seed)
    other_N = random.normal(size=len(values_N))
    order_N = random.permutation(len(values_N))
    for correlation in (pearson, spearman):
        found = correlation(values_N, other_N)
        assert np.isnan(found) == (np.ptp(values_N) == 0)
        if np.isfinite(found):
            assert -1 <= found <= 1
            assert correlation(values_N[order_N], other_N[order_N]) == pytest.approx(found, abs=1e-6)
            assert correlation(other_N, values_N) == pytest.approx(found, abs=1e-6)
            assert correlation(values_N, -scale * other_N + offset) == pytest.approx(-found, abs=1e-6)
            assert correlation(values_N, values_N) == pytest.approx(1)


@given(NUMBERS)
def test_pearson_is_that_of_numpy(values_N: Float64) -> None:
    other_N = np.sin(np.arange(len(values_N)))
    if np.std(values_N) > 1e-3 * np.abs(values_N).max():
        assert pearson(values_N, other_N) == pytest.approx(np.corrcoef(values_N, other_N)[0, 1], abs=1e-9)


@given(NUMBERS)
def test_ranks_are_the_mean_places_among_the_sorted(values_N: Float64) -> None:
    sorted_N = np.sort(values_N)
    expected = [np.mean(np.flatnonzero(sorted_N == value) + 1) for value in values_N]
    np.testing.assert_array_equal(ranks(values_N), expected)


@pytest.mark.parametrize("rising", [np.exp, lambda x: x**3, np.arctan])
def test_spearman_sees_the_order_alone(rising: Callable[[Float64], Float64]) -> None:
    values_N = np.array([-2.0, 0.5, 3.0, 1.0])
    other_N = np.array([1.0, 4.0, 2.0, 3.0])
    assert spearman(rising(values_N), other_N) == spearman(values_N, other_N)
    assert spearman(rising(values_N), values_N) == pytest.approx(1)


@given(SEEDS)
def test_places_along_the_axis_are_0_for_the_mean_role_and_1_for_the_default(seed: int) -> None:
    random = np.random.default_rng(seed)
    roles_AD, default_D = random.normal(size=(6, 5)), random.normal(size=5)
    axis_D = default_D - roles_AD.mean(axis=0)
    assert positions(roles_AD, axis_D).mean() == pytest.approx(0, abs=1e-12)
    # A seventh role where the default lies, seen from the mean of the seven.
    place = positions(np.vstack([roles_AD, default_D]), axis_D)
    assert place[-1] - place[:-1].mean() == pytest.approx(1)
    np.testing.assert_array_equal(positions(roles_AD, np.zeros(5)), np.zeros(6))


def test_loadings_are_those_that_the_components_were_made_of() -> None:
    random = np.random.default_rng(0)
    vectors_AD, scale_D = random.normal(size=(7, 4)), np.array([1.0, 2.0, 0.0, 0.5])
    scaled_AD = (vectors_AD - vectors_AD.mean(axis=0)) * scale_D
    left_AK, singular_K, components_KD = np.linalg.svd(scaled_AD, full_matrices=False)
    found = coordinates(vectors_AD, vectors_AD.mean(axis=0), scale_D, components_KD)
    np.testing.assert_allclose(found, left_AK * singular_K, atol=1e-12)


def test_layers_of_the_same_relative_depth() -> None:
    layers = [0, 1, 2, 3]
    assert same_depth(layers, 4, [0, 2, 4, 6], 7).tolist() == [0, 1, 2, 3]
    assert same_depth(layers, 4, layers, 4).tolist() == layers
    assert same_depth([5], 11, [0, 9], 10).tolist() == [0], "of two that are equally near, the earlier"
    assert same_depth([0], 1, [0, 1], 2).tolist() == [0]
