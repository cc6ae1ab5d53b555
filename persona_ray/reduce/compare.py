"""How alike two persona spaces are: formulas, one a function.

Directions can be held against each other only where both live in the same residual stream: one model, or two of which one was
trained from the other (Lu et al. 2026, App. B.3: base against instruct). Across models there is no common dim; what can be held
against each other there are numbers that archetypes get in each of them (section 2.2, App. C.3: PC1 role loadings correlate above
0.92 between all pairs of models). Arrays only; stores, names and judges are unknown here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from persona_ray.spec import Float64


def cosines(one_ND: Float64, other_ND: Float64) -> Float64:
    """Cosine of each of N directions with its counterpart: (N,), -1..1; NaN where one of them is 0."""
    dot_N: Float64 = np.einsum("nd,nd->n", one_ND, other_ND)
    norms_N: Float64 = np.linalg.norm(one_ND, axis=-1) * np.linalg.norm(other_ND, axis=-1)
    return np.clip(np.divide(dot_N, norms_N, out=np.full_like(dot_N, np.nan), where=norms_N > 0), -1.0, 1.0)


def principal_angles(one_KD: Float64, other_KD: Float64) -> Float64:
    """Angles between the subspaces that K independent directions each span: (K,), degrees 0..90, the smallest first.

    From the sines where the cosines are near 1 (Björck and Golub 1973): a cosine loses half of the digits of a small angle.
    """
    one_DK, other_DK = np.linalg.qr(one_KD.T)[0], np.linalg.qr(other_KD.T)[0]
    across_KK = one_DK.T @ other_DK
    cosine_K = np.clip(np.linalg.svd(across_KK, compute_uv=False), 0.0, 1.0)
    sine_K = np.clip(np.linalg.svd(other_DK - one_DK @ across_KK, compute_uv=False), 0.0, 1.0)[::-1]
    angles_K: Float64 = np.degrees(np.where(cosine_K**2 >= 0.5, np.arcsin(sine_K), np.arccos(cosine_K)))
    return angles_K


def pearson(one_N: Float64, other_N: Float64) -> float:
    """Correlation of two lists of N numbers, -1..1; NaN where one of them does not vary, or N < 2."""
    if len(one_N) < 2 or np.ptp(one_N) == 0 or np.ptp(other_N) == 0:
        return float("nan")
    return float(cosines(_standing_off(one_N), _standing_off(other_N))[0])


def spearman(one_N: Float64, other_N: Float64) -> float:
    """Correlation of their ranks: the same for whatever rises with the numbers. NaN as in `pearson`."""
    return pearson(ranks(one_N), ranks(other_N))


def ranks(values_N: Float64) -> Float64:
    """Rank of each number, the smallest is 1; equal ones share the mean of their ranks: (N,)."""
    _, group_N, count_G = np.unique(values_N, return_inverse=True, return_counts=True)
    mean_rank_G = np.cumsum(count_G) - (count_G - 1) / 2
    mean_rank_N: Float64 = mean_rank_G[group_N]
    return mean_rank_N


def coordinates(vectors_AD: Float64, mean_D: Float64, scale_D: Float64, components_KD: Float64) -> Float64:
    """Loadings of vectors on principal components, ((x - mean) * scale) @ components: (A, K), units of the residual stream over scale."""
    loadings_AK: Float64 = ((vectors_AD - mean_D) * scale_D) @ components_KD.T
    return loadings_AK


def positions(vectors_AD: Float64, axis_D: Float64) -> Float64:
    """Place of each vector along the axis from the mean of all: (A,), in lengths of the axis. The default Assistant's would be 1.

    For role vectors 0 is the mean role, because axis = default vector - mean of role vectors. 0 everywhere if the axis is 0.
    """
    square = float(axis_D @ axis_D)
    dots_A: Float64 = (vectors_AD - vectors_AD.mean(axis=0)) @ axis_D
    return dots_A / square if square > 0 else np.zeros_like(dots_A)


def same_depth(layers: Sequence[int], num_blocks: int, others: Sequence[int], num_others: int) -> npt.NDArray[np.intp]:
    """For each of `layers`, the place among `others` (a model of `num_others` decoder blocks) that is nearest in relative depth.

    Depth runs from 0, the first block, to 1, the last one; of two that are equally near, the earlier.
    """
    depth_L = np.asarray(layers) / max(1, num_blocks - 1)
    depth_M = np.asarray(others) / max(1, num_others - 1)
    place_L: npt.NDArray[np.intp] = np.abs(depth_L[:, None] - depth_M[None, :]).argmin(axis=1)
    return place_L


def _standing_off(values_N: Float64) -> Float64:
    """From their mean, and divided by the largest, so that no square overflows or vanishes: (1, N). Not all may be 0."""
    off_N = values_N / np.abs(values_N).max()
    off_N = off_N - off_N.mean()
    off_1N: Float64 = (off_N / (np.abs(off_N).max() or 1.0))[None]
    return off_1N
