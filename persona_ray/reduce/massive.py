"""Massive dims: the few dims of the residual stream that are many times larger than the others, and what they mean for an axis.

Known as massive activations (Sun et al. 2024) or outlier dims (Timkey and van Schijndel 2021). They are much the same in every
text, so differences of means lose most of them; what is left may still rule cosines and components. They are reported always and left
out of components on request (`reduce.pca: masked`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from persona_ray.spec import Float64

MASSIVE_TIMES = 20.0
"""A dim is massive if its size is so many times that of the median dim of its layer."""
MAX_NAMED = 16


@dataclass(frozen=True, slots=True)
class MassiveDims:
    """Which dims stand out, per layer."""

    times_LD: Float64
    """Size of each dim (root mean square over the vectors) over that of the median dim."""

    @property
    def is_massive_LD(self) -> npt.NDArray[np.bool_]:
        """Those that stand out."""
        return self.times_LD >= MASSIVE_TIMES

    def named(self, place: int) -> dict[str, float]:
        """Dim -> times, the largest first, at most `MAX_NAMED`; of the layer at `place`."""
        times_D = self.times_LD[place]
        largest = np.argsort(-times_D, kind="stable")[:MAX_NAMED]
        return {str(dim): float(f"{times_D[dim]:.4g}") for dim in largest.tolist() if times_D[dim] >= MASSIVE_TIMES}


def massive_dims(vectors_ALD: Float64) -> MassiveDims:
    """Of any vectors that are means over many tokens, such as role vectors; a layer whose median dim is 0 has none."""
    size_LD = np.sqrt(np.mean(vectors_ALD**2, axis=0))
    median_L1 = np.median(size_LD, axis=-1, keepdims=True)
    return MassiveDims(np.divide(size_LD, median_L1, out=np.zeros_like(size_LD), where=median_L1 > 0))


def participation(axis_LD: Float64) -> Float64:
    """How many dims carry the axis: (sum u^2)^2 / sum u^4, the participation ratio, 1 to D; 0 where the axis is 0. (L,)."""
    square_LD = axis_LD**2
    fourth_L = (square_LD**2).sum(axis=-1)
    total_L = square_LD.sum(axis=-1) ** 2
    number_L: Float64 = np.divide(total_L, fourth_L, out=np.zeros_like(total_L), where=fourth_L > 0)
    return number_L


def massive_share(axis_LD: Float64, massive: MassiveDims) -> Float64:
    """Share of the axis's squared length that lies in massive dims, 0..1; 0 where the axis is 0. (L,)."""
    square_LD = axis_LD**2
    total_L = square_LD.sum(axis=-1)
    part_L = np.where(massive.is_massive_LD, square_LD, 0.0).sum(axis=-1)
    share_L: Float64 = np.divide(part_L, total_L, out=np.zeros_like(total_L), where=total_L > 0)
    return share_L


def facts(axis_LD: Float64, massive: MassiveDims) -> dict[str, Any]:
    """For a result's attributes, lists by layer."""
    return {
        "massive_dims": [massive.named(place) for place in range(len(axis_LD))],
        "axis_share_of_massive_dims": [float(f"{share:.6g}") for share in massive_share(axis_LD, massive)],
        "axis_participation": [float(f"{number:.6g}") for number in participation(axis_LD)],
    }
