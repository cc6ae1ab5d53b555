from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_ray.reduce.pca import principal_components


@settings(deadline=None)
@given(seed=st.integers(0, 2**16), vectors=st.integers(2, 8), width=st.integers(2, 8), rank=st.integers(1, 10))
def test_against_the_eigenvectors_of_the_covariance(seed: int, vectors: int, width: int, rank: int) -> None:
    generator = np.random.default_rng(seed)
    role_ALD, toward_LD = generator.standard_normal((vectors, 2, width)) + 50, generator.standard_normal((2, width))
    found = principal_components(role_ALD, toward_LD, rank)
    kept = min(rank, vectors - 1, width)
    assert found.components_LKD.shape == (2, kept, width)
    for layer in range(2):
        covariance_DD = np.cov(role_ALD[:, layer], rowvar=False, ddof=1)
        values = np.linalg.eigvalsh(covariance_DD)[::-1]
        np.testing.assert_allclose(found.explained_variance_LK[layer], values[:kept], atol=1e-9)
        np.testing.assert_allclose(found.explained_variance_ratio_LK[layer], values[:kept] / values.sum(), atol=1e-9)
        components_KD = found.components_LKD[layer]
        np.testing.assert_allclose(components_KD @ components_KD.T, np.eye(kept), atol=1e-9)
        np.testing.assert_allclose(covariance_DD @ components_KD[0], values[0] * components_KD[0], atol=1e-9)


def test_role_components_are_those_of_a_full_decomposition_to_ten_digits() -> None:
    generator = np.random.default_rng(3)
    basis_KD = np.linalg.qr(generator.standard_normal((120, 40)))[0].T * 30 * np.arange(1.0, 41)[:, None] ** -0.7
    role_ALD = (generator.standard_normal((90, 2, 40)) @ basis_KD + 0.05 * generator.standard_normal((90, 2, 120))) + 400
    found = principal_components(role_ALD, np.ones((2, 120)), 64)
    for layer in range(2):
        centred_AD = role_ALD[:, layer] - role_ALD[:, layer].mean(axis=0)
        _, singular_K, expected_KD = np.linalg.svd(centred_AD, full_matrices=False)
        variance_K = singular_K**2 / 89
        np.testing.assert_allclose(found.explained_variance_LK[layer], variance_K[:64], rtol=1e-10)
        np.testing.assert_allclose(found.explained_variance_ratio_LK[layer], variance_K[:64] / variance_K.sum(), rtol=1e-10)
        signs_K = np.sign(np.einsum("kd,kd->k", found.components_LKD[layer], expected_KD[:64]))
        np.testing.assert_allclose(found.components_LKD[layer] * signs_K[:, None], expected_KD[:64], atol=1e-10)


@given(seed=st.integers(0, 2**16))
def test_signs_follow_the_rule_whatever_the_solver_gives(seed: int) -> None:
    generator = np.random.default_rng(seed)
    role_ALD, toward_LD = generator.standard_normal((6, 1, 5)), generator.standard_normal((1, 5))
    components_KD = principal_components(role_ALD, toward_LD, 4).components_LKD[0]
    assert components_KD[0] @ toward_LD[0] > 0
    for component_D in components_KD[1:]:
        assert component_D[np.abs(component_D).argmax()] > 0
    turned_KD = principal_components(role_ALD, -toward_LD, 4).components_LKD[0]
    np.testing.assert_allclose(turned_KD[0], -components_KD[0], atol=1e-12)
    np.testing.assert_allclose(turned_KD[1:], components_KD[1:], atol=1e-12)


def test_pc1_at_right_angles_to_the_default_falls_back_on_its_largest_loading() -> None:
    role_ALD = np.array([[[1.0, 0.0]], [[-1.0, 0.0]]])
    components_KD = principal_components(role_ALD, np.array([[0.0, 1.0]]), 3).components_LKD[0]
    np.testing.assert_allclose(components_KD, [[1.0, 0.0]], atol=1e-12)


def test_a_planted_direction_is_found_with_its_variance() -> None:
    planted_D = np.array([0.6, 0.8, 0.0])
    positions = np.array([-3.0, -1.0, 1.0, 3.0])
    role_ALD = (positions[:, None] * planted_D)[:, None, :] + 100
    found = principal_components(role_ALD, -planted_D[None], 1)
    np.testing.assert_allclose(found.components_LKD[0, 0], -planted_D, atol=1e-12)
    assert found.explained_variance_LK[0, 0] == pytest.approx(positions.var(ddof=1))
    assert found.explained_variance_ratio_LK[0, 0] == pytest.approx(1.0)


def test_the_ratio_is_of_the_total_even_if_few_components_are_kept() -> None:
    role_ALD = np.array([[[2.0, 0.0]], [[-2.0, 0.0]], [[0.0, 1.0]], [[0.0, -1.0]]])
    found = principal_components(role_ALD, np.array([[1.0, 1.0]]), 1)
    np.testing.assert_allclose(found.explained_variance_ratio_LK, [[0.8]])


def test_equal_vectors_have_no_variance_and_no_nan() -> None:
    found = principal_components(np.ones((3, 1, 4)), np.ones((1, 4)), 2)
    np.testing.assert_array_equal(found.explained_variance_ratio_LK, [[0.0, 0.0]])
    assert np.isfinite(found.components_LKD).all()
