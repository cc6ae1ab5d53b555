"""Exact principal components of single rollouts, through their scatter matrix: one pass, D x D in float64 for each layer.

For the few layers where exactness is wanted: 0.5 GB for each at D = 8,192, whatever the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from persona_ray.errors import IntegrityError, NothingUsableError
from persona_ray.reduce.pca import PrincipalComponents, signed
from persona_ray.spec import Float32, Float64


@dataclass(frozen=True, slots=True)
class Scatter:
    """Mean, and sum of outer products of differences from it, of `count` rows at L layers; float64. Mergeable, exact up to rounding."""

    rank: int
    """Components that will be asked for."""
    count: int
    mean_LD: Float64
    scatter_LDD: Float64

    @classmethod
    def of(cls, rows_RLD: Float32, rank: int) -> Self:
        """Of these rows, R >= 0. Raises IntegrityError for NaN or Inf among them."""
        num_rows, num_layers, width = rows_RLD.shape
        if num_rows == 0:
            return cls(rank, 0, np.zeros((num_layers, width)), np.zeros((num_layers, width, width)))
        rows_LRD = np.swapaxes(rows_RLD, 0, 1).astype(np.float64)
        mean_LD = rows_LRD.mean(axis=1)
        rows_LRD -= mean_LD[:, None]
        scatter_LDD = np.stack([rows_RD.T @ rows_RD for rows_RD in rows_LRD])
        if not np.isfinite(scatter_LDD).all():
            raise IntegrityError("rows hold NaN or Inf, or values so large that their squares overflow")
        return cls(rank, num_rows, mean_LD, scatter_LDD)

    def merge(self, other: Self) -> Self:
        """Of the rows of both (Chan, Golub and LeVeque 1979, with outer products). Raises IntegrityError if ranks or shapes differ."""
        if (self.rank, self.mean_LD.shape) != (other.rank, other.mean_LD.shape):
            raise IntegrityError(
                f"a scatter of {self.mean_LD.shape} and rank {self.rank} and one of {other.mean_LD.shape} and {other.rank}"
            )
        if not (self.count and other.count):
            return self if self.count else other
        count = self.count + other.count
        delta_LD = other.mean_LD - self.mean_LD
        shared = self.count * other.count / count
        scatter_LDD = self.scatter_LDD + other.scatter_LDD
        for place, delta_D in enumerate(delta_LD):
            scatter_LDD[place] += np.outer(shared * delta_D, delta_D)
        return type(self)(self.rank, count, self.mean_LD + delta_LD * (other.count / count), scatter_LDD)

    def components(self, toward_LD: Float64) -> PrincipalComponents:
        """At most `rank` components of the rows, signs as in `principal_components`. Raises NothingUsableError for fewer than two rows."""
        if self.count < 2:
            raise NothingUsableError(f"components of rollouts need two rows or more, and there are {self.count}")
        num_kept = min(self.rank, self.count - 1, self.mean_LD.shape[-1])
        components, variances, ratios = [], [], []
        for scatter_DD, toward_D in zip(self.scatter_LDD, toward_LD, strict=True):
            values_D, vectors_DD = np.linalg.eigh(scatter_DD)
            square_K = np.clip(values_D[::-1][:num_kept], 0.0, None)
            total = float(np.trace(scatter_DD))
            components.append(signed(vectors_DD[:, ::-1][:, :num_kept].T, toward_D))
            variances.append(square_K / (self.count - 1))
            ratios.append(square_K / total if total > 0 else np.zeros_like(square_K))
        return PrincipalComponents(self.mean_LD, np.ones_like(self.mean_LD), np.stack(components), np.stack(variances), np.stack(ratios))
