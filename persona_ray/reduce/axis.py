"""The Assistant Axis, positions along it, and the layer where it tells the default Assistant from the roles best.

axis = default vector - unweighted mean of the role vectors, per layer (Lu et al. 2026, section 3.1): it points to the
Assistant, so a higher projection is more Assistant-like. The paper prefers this contrast to PC1, which is not an
Assistant axis in every model. Arrays of vectors only; rows and names are unknown here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from persona_ray.reduce.moments import GroupMoments
from persona_ray.reduce.presets import Rounding, unrounded
from persona_ray.spec import Float32, Float64


def assistant_axis(default_vector_LD: Float64, role_vector_ALD: Float64, rounding: Rounding = unrounded) -> Float64:
    """Default minus the mean of role vectors, every archetype counted once: (L, D). `rounding` of mean and difference."""
    return rounding(default_vector_LD - rounding(role_vector_ALD.mean(axis=0)))


def projections(vectors_ALD: Float32 | Float64, axis_LD: Float64) -> Float64:
    """Per layer x . axis / ||axis||, (A, L), in units of the residual stream; 0 at a layer whose axis is 0."""
    dots_AL: Float64 = np.einsum("ald,ld->al", vectors_ALD, axis_LD)
    norm_L: Float64 = np.linalg.norm(axis_LD, axis=-1)
    return np.divide(dots_AL, norm_L, out=np.zeros_like(dots_AL), where=norm_L > 0)


def separation(axis_LD: Float64, within: Collection[GroupMoments]) -> Float64:
    """An index of how well the axis tells the default Assistant from the roles, for comparing layers: (L,), no unit.

    (default projection - mean role projection) / s. The numerator is ||axis||; s is the spread along the axis of single
    rows around their own archetype's mean, pooled over `within` (the default's rows and those of the role vectors). It is
    made of variances per dim, s^2 = sum_d u_d^2 var_d with u = axis / ||axis||: dims count as uncorrelated. Moments allow
    no more. Real dims are correlated, so the index is larger than the exact d' (2 to 3 times with a tiny model),
    while it ranks the layers much alike. NaN where s cannot be told: no archetype with two rows, or rows that do not differ.
    """
    degrees = sum(moments.count - 1 for moments in within)
    norm_L: Float64 = np.linalg.norm(axis_LD, axis=-1)
    if degrees == 0:
        return np.full_like(norm_L, np.nan)
    variance_LD = sum(moments.m2_LD for moments in within) / degrees
    # s = root / norm, so norm / s = norm^2 / root: no division by the norm of a layer whose axis is 0.
    root_L: Float64 = np.sqrt(np.einsum("ld,ld->l", axis_LD**2, variance_LD))
    return np.divide(norm_L**2, root_L, out=np.full_like(norm_L, np.nan), where=root_L > 0)


def best_layer(separation_L: Float64, layers: Sequence[int]) -> tuple[int, str]:
    """The decoder block of largest separation, and why it was taken, in words.

    The last captured layer is passed over where there is another: nothing is left after it to act on a steered state.
    Where no separation is known, the middle layer, as in the paper.
    """
    candidates = range(max(1, len(layers) - 1))
    known = [position for position in candidates if math.isfinite(separation_L[position])]
    if not known:
        layer = layers[len(layers) // 2]
        return layer, f"layer {layer} is the middle one; no archetype has rows that differ, so layers cannot be compared"
    best = max(known, key=lambda position: float(separation_L[position]))
    if len(layers) == 1:
        return layers[best], f"layer {layers[best]} is the only one that was captured"
    return layers[best], (
        f"layer {layers[best]} has the largest separation, {separation_L[best]:.3g} (distance of the default Assistant from the roles "
        "along the axis over the spread of single rows, dims taken as uncorrelated); the last layer is left out"
    )
