"""Principal components of a set of vectors, per layer: centred, exact; as they are, standardised, or without massive dims.

Lu et al. 2026, section 2.1.3: centred, not scaled. Vectors in, components out; which vectors is decided elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from persona_ray.reduce.massive import massive_dims
from persona_ray.spec import Float64

Scaling = Literal["plain", "standardised", "masked"]


@dataclass(frozen=True, slots=True)
class PrincipalComponents:
    """Components by falling variance; float64. A vector's coordinates are ((x - mean_LD) * scale_LD) @ components."""

    mean_LD: Float64
    """Of the vectors."""
    scale_LD: Float64
    """What every dim was multiplied with, after centring: 1; or 1 / its standard deviation; or 0 where it is massive."""
    components_LKD: Float64
    """Unit vectors in the scaled space."""
    explained_variance_LK: Float64
    """With A - 1 in the denominator."""
    explained_variance_ratio_LK: Float64
    """Of the total variance, that of dropped components included; 0 at a layer without any variance."""


def principal_components(vectors_ALD: Float64, toward_LD: Float64, rank: int, scaling: Scaling = "plain") -> PrincipalComponents:
    """At most `rank`, and at most A - 1 or D, components of A >= 2 vectors at every layer, by singular value decomposition.

    Signs: PC1 has a positive dot product with `toward_LD` (scaled alike), the direction from the mean of the roles to the default
    Assistant (the axis); every further component, and a PC1 at right angles to it, has its largest absolute loading positive (the
    first of equals).
    """
    num_vectors, _, width = vectors_ALD.shape
    num_kept = min(rank, num_vectors - 1, width)
    mean_LD = vectors_ALD.mean(axis=0)
    scale_LD = scale_of(vectors_ALD, scaling)
    scaled_LAD = np.swapaxes((vectors_ALD - mean_LD) * scale_LD, 0, 1)
    layers = [_one_layer(scaled_AD, toward_D, num_kept) for scaled_AD, toward_D in zip(scaled_LAD, toward_LD * scale_LD, strict=True)]
    components, variances, ratios = zip(*layers, strict=True)
    return PrincipalComponents(mean_LD, scale_LD, np.stack(components), np.stack(variances), np.stack(ratios))


def scale_of(vectors_ALD: Float64, scaling: Scaling) -> Float64:
    """(L, D). A dim that does not vary is not blown up: its scale is 0 when others are standardised."""
    match scaling:
        case "plain":
            return np.ones(vectors_ALD.shape[1:])
        case "masked":
            return np.where(massive_dims(vectors_ALD).is_massive_LD, 0.0, 1.0)
        case "standardised":
            deviation_LD = vectors_ALD.std(axis=0, ddof=1)
            inverse_LD: Float64 = np.divide(1.0, deviation_LD, out=np.zeros_like(deviation_LD), where=deviation_LD > 0)
            return inverse_LD


def _one_layer(scaled_AD: Float64, toward_D: Float64, num_kept: int) -> tuple[Float64, Float64, Float64]:
    _, singular, components = np.linalg.svd(scaled_AD, full_matrices=False)
    variance = singular**2 / (len(scaled_AD) - 1)
    total = variance.sum()
    ratio = variance / total if total > 0 else np.zeros_like(variance)
    return signed(components[:num_kept], toward_D), variance[:num_kept], ratio[:num_kept]


def signed(components_KD: Float64, toward_D: Float64) -> Float64:
    """The same components with the signs of the rule in `principal_components`."""
    largest_K = np.abs(components_KD).argmax(axis=1)
    sign_K = np.sign(components_KD[np.arange(len(components_KD)), largest_K])
    sign_K[0] = np.sign(components_KD[0] @ toward_D) or sign_K[0]
    signed_KD: Float64 = components_KD * sign_K[:, None]
    return signed_KD
