"""Principal components of the role vectors, per layer: centred, not scaled, exact.

Lu et al. 2026, section 2.1.3. Vectors in, components out; which vectors is decided elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from persona_ray.spec import Float64


@dataclass(frozen=True, slots=True)
class PrincipalComponents:
    """Components by falling variance; float64."""

    components_LKD: Float64
    """Unit vectors."""
    explained_variance_LK: Float64
    """With A - 1 in the denominator."""
    explained_variance_ratio_LK: Float64
    """Of the total variance, that of dropped components included; 0 at a layer without any variance."""


def principal_components(role_vector_ALD: Float64, toward_LD: Float64, rank: int) -> PrincipalComponents:
    """At most `rank`, and at most A - 1 or D, components of A >= 2 vectors at every layer, by singular value decomposition.

    Signs: PC1 has a positive dot product with `toward_LD`, the direction from the mean of the roles to the default
    Assistant (the axis); every further component, and a PC1 at right angles to it, has its largest absolute loading
    positive (the first of equals).
    """
    num_vectors, _, width = role_vector_ALD.shape
    num_kept = min(rank, num_vectors - 1, width)
    centred_LAD = np.swapaxes(role_vector_ALD - role_vector_ALD.mean(axis=0), 0, 1)
    layers = [_one_layer(centred_AD, toward_D, num_kept) for centred_AD, toward_D in zip(centred_LAD, toward_LD, strict=True)]
    components, variances, ratios = zip(*layers, strict=True)
    return PrincipalComponents(np.stack(components), np.stack(variances), np.stack(ratios))


def _one_layer(centred_AD: Float64, toward_D: Float64, num_kept: int) -> tuple[Float64, Float64, Float64]:
    _, singular, components = np.linalg.svd(centred_AD, full_matrices=False)
    variance = singular**2 / (len(centred_AD) - 1)
    total = variance.sum()
    ratio = variance / total if total > 0 else np.zeros_like(variance)
    return _signed(components[:num_kept], toward_D), variance[:num_kept], ratio[:num_kept]


def _signed(components_KD: Float64, toward_D: Float64) -> Float64:
    largest_K = np.abs(components_KD).argmax(axis=1)
    sign_K = np.sign(components_KD[np.arange(len(components_KD)), largest_K])
    sign_K[0] = np.sign(components_KD[0] @ toward_D) or sign_K[0]
    signed_KD: Float64 = components_KD * sign_K[:, None]
    return signed_KD
