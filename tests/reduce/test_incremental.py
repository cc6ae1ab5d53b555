from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_ray.errors import IntegrityError, NothingUsableError
from persona_ray.reduce.incremental import IncrementalPCA, Sizes
from persona_ray.reduce.merging import fold_all, merge_all
from persona_ray.reduce.pca import PrincipalComponents, principal_components
from persona_ray.reduce.scatter import Scatter
from persona_ray.spec import Float32

KINDS = pytest.mark.parametrize("kind", [IncrementalPCA, Scatter])


def some_rows(seed: int, number: int, layers: int = 2, width: int = 7) -> Float32:
    return (np.random.default_rng(seed).standard_normal((number, layers, width)) * np.arange(1, width + 1) + 40).astype(np.float32)


def like_activations(number: int = 4000, width: int = 384, directions: int = 300) -> Float32:
    """(N, 1, D): variance that falls as a power law, a floor of noise, two massive dims, and a mean far from 0."""
    generator = np.random.default_rng(5)
    basis_KD = np.linalg.qr(generator.standard_normal((width, directions)))[0].T
    strength_K = 10 * np.arange(1.0, directions + 1) ** -0.7
    rows_ND = (generator.standard_normal((number, directions)) * strength_K) @ basis_KD + 0.05 * generator.standard_normal((number, width))
    mean_D = generator.standard_normal(width)
    mean_D[:2] *= 500
    rows_ND[:, 0] += 30 * generator.standard_normal(number)
    return (rows_ND + mean_D)[:, None].astype(np.float32)


def exact(rows_NLD: Float32, rank: int) -> PrincipalComponents:
    return principal_components(rows_NLD.astype(np.float64), toward(rows_NLD), rank)


def toward(rows_NLD: Float32) -> np.ndarray:
    return np.ones(rows_NLD.shape[1:])


@KINDS
@given(seed=st.integers(0, 2**16), sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6), is_tree=st.booleans())
def test_any_pieces_give_what_all_rows_give_while_nothing_is_cut(
    kind: type[IncrementalPCA | Scatter], seed: int, sizes: list[int], is_tree: bool
) -> None:
    rows_NLD = some_rows(seed, sum(sizes))
    pieces = np.split(rows_NLD, np.cumsum(sizes)[:-1])
    state = (merge_all if is_tree else fold_all)(kind.of(piece, 7) for piece in pieces)  # type: ignore[type-var]
    if len(rows_NLD) < 2:
        with pytest.raises(NothingUsableError, match="two rows or more"):
            state.components(toward(rows_NLD))
        return
    found, expected = state.components(toward(rows_NLD)), exact(rows_NLD, 7)
    np.testing.assert_allclose(found.mean_LD, expected.mean_LD, rtol=1e-9)
    number = expected.explained_variance_LK.shape[1]
    np.testing.assert_allclose(found.explained_variance_LK[:, :number], expected.explained_variance_LK, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.explained_variance_ratio_LK[:, :number], expected.explained_variance_ratio_LK, atol=1e-7)


def test_the_scatter_agrees_with_a_full_decomposition() -> None:
    rows_NLD = like_activations()
    found = merge_all(Scatter.of(piece, 20) for piece in np.array_split(rows_NLD, 9)).components(toward(rows_NLD))
    expected = exact(rows_NLD, 20)
    np.testing.assert_allclose(found.explained_variance_LK, expected.explained_variance_LK, rtol=1e-6)
    np.testing.assert_allclose(found.explained_variance_ratio_LK, expected.explained_variance_ratio_LK, rtol=1e-6)
    np.testing.assert_allclose(found.components_LKD, expected.components_LKD, atol=1e-6)


def test_bounded_memory_costs_less_than_a_thousandth_of_the_first_ten_variances() -> None:
    rows_NLD = like_activations()
    pieces = np.array_split(rows_NLD, 40)
    whole = fold_all(IncrementalPCA.of(piece, 64) for piece in pieces)
    assert whole.factor_LMD.shape[1] < Sizes.of(64).longest
    eight = [fold_all(IncrementalPCA.of(piece, 64) for piece in pieces[start : start + 5]) for start in range(0, 40, 5)]
    expected = exact(rows_NLD, 64)
    for state in (whole, merge_all(eight)):
        found = state.components(toward(rows_NLD))
        np.testing.assert_allclose(found.explained_variance_LK[:, :10], expected.explained_variance_LK[:, :10], rtol=1e-3)
        np.testing.assert_allclose(found.explained_variance_ratio_LK[:, :10], expected.explained_variance_ratio_LK[:, :10], rtol=1e-3)
        cosines_K = np.einsum("kd,kd->k", found.components_LKD[0, :10], expected.components_LKD[0, :10])
        assert np.abs(cosines_K).min() > 0.999


def test_the_total_variance_is_exact_though_most_directions_are_cut() -> None:
    rows_NLD = like_activations()
    state = fold_all(IncrementalPCA.of(piece, 2) for piece in np.array_split(rows_NLD, 40))
    assert state.factor_LMD.shape[1] < 20
    np.testing.assert_allclose(
        state.total_L / (len(rows_NLD) - 1), rows_NLD.astype(np.float64).var(axis=0, ddof=1).sum(axis=-1), rtol=1e-10
    )


@KINDS
def test_signs_and_unit_length(kind: type[IncrementalPCA | Scatter]) -> None:
    rows_NLD = some_rows(1, 30)
    for sign in (1, -1):
        found = kind.of(rows_NLD, 4).components(sign * toward(rows_NLD))
        assert (sign * found.components_LKD[:, 0].sum(axis=-1) > 0).all()
        for layer in found.components_LKD:
            np.testing.assert_allclose(layer @ layer.T, np.eye(4), atol=1e-9)


@KINDS
def test_rows_that_are_not_numbers_and_states_that_do_not_fit_are_refused(kind: type[IncrementalPCA | Scatter]) -> None:
    rows_NLD = some_rows(2, 5)
    broken_NLD = rows_NLD.copy()
    broken_NLD[3, 1, 2] = np.nan
    with pytest.raises(IntegrityError, match="NaN or Inf"):
        kind.of(broken_NLD, 3)
    make = partial(kind.of, rows_NLD)
    with pytest.raises(IntegrityError, match="rank"):
        make(3).merge(make(4))  # type: ignore[arg-type]


def test_memory_does_not_grow_with_rows() -> None:
    state, longest = IncrementalPCA.of(some_rows(0, 0, width=64), 4), 0
    for seed in range(60):
        state = state.merge(IncrementalPCA.of(some_rows(seed, 10, width=64), 4))
        longest = max(longest, state.factor_LMD.shape[1])
    assert longest < Sizes.of(4).longest
    assert state.count == 600
