"""Exact principal components of single rollouts, through their scatter matrix: one pass, D x D in float64 for each layer.

For the few layers where exactness is wanted: 0.5 GB for each at D = 8,192, whatever the number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from persona_ray.errors import IntegrityError, NothingUsableError
from persona_ray.reduce import gpu
from persona_ray.reduce.incremental import IncrementalPCA
from persona_ray.reduce.pca import PrincipalComponents, signed
from persona_ray.spec import Float32, Float64, ScoredRows

BLOCK_ROWS = 128
"""Of a matrix, at a time."""


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
        scatter_LDD = gpu.scatter(rows_LRD) if gpu.is_given() else np.matmul(rows_LRD.mT, rows_LRD)
        if not np.isfinite(scatter_LDD).all():
            raise IntegrityError("rows hold NaN or Inf, or values so large that their squares overflow")
        return cls(rank, num_rows, mean_LD, scatter_LDD)

    @classmethod
    def of_unit(cls, rows: ScoredRows, rank: int) -> Self:
        """Of one unit."""
        return cls.of(rows.activations_RLD, rank)

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
        for scatter_DD, delta_D in zip(scatter_LDD, delta_LD, strict=True):
            for some in range(0, len(delta_D), BLOCK_ROWS):  # without a second matrix of that size
                block = slice(some, some + BLOCK_ROWS)
                scatter_DD[block] += np.outer(shared * delta_D[block], delta_D)
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


@dataclass(frozen=True, slots=True)
class ExactAtSome:
    """Components that are exact at some of L layers, and as `others` has them elsewhere: all of the same rows."""

    others: IncrementalPCA
    exact: Mapping[int, Scatter]
    """Place in the layer dim -> the scatter of that layer alone."""

    @property
    def count(self) -> int:
        """Rows."""
        return self.others.count

    def components(self, toward_LD: Float64) -> PrincipalComponents:
        """As `IncrementalPCA.components`. Raises IntegrityError if a scatter is of other rows."""
        found = self.others.components(toward_LD)
        components_LKD, variance_LK = found.components_LKD.copy(), found.explained_variance_LK.copy()
        ratio_LK = found.explained_variance_ratio_LK.copy()
        for place, scatter in self.exact.items():
            if (scatter.count, scatter.rank) != (self.count, self.others.rank):
                raise IntegrityError(f"a scatter of {scatter.count} rows beside components of {self.count}")
            exactly = scatter.components(toward_LD[place : place + 1])
            components_LKD[place], variance_LK[place] = exactly.components_LKD[0], exactly.explained_variance_LK[0]
            ratio_LK[place] = exactly.explained_variance_ratio_LK[0]
        return PrincipalComponents(found.mean_LD, found.scale_LD, components_LKD, variance_LK, ratio_LK)
