"""Principal components of single rollouts, from one pass in bounded memory: incremental PCA whose states merge.

A state is the exact mean, the exact total variance, and a factor F of few rows with F^T F close to the scatter of its rows.
Adding rows, or another state, stacks factors and a row for the difference of means (Ross, Lim, Lin and Yang 2008, section 2.1, on
which scikit-learn's IncrementalPCA rests), and cuts the stack back to its leading directions when it has grown too long. The cut
goes through the small Gram matrix of the stack in float64, not through a decomposition of the stack itself. More directions are
carried than are asked for, which keeps the error of cutting small; so does adding batches to one growing state (`fold_all`)
rather than merging states of few rows. A task that was given a GPU cuts there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from persona_ray.errors import IntegrityError, NothingUsableError
from persona_ray.reduce import gpu
from persona_ray.reduce.pca import PrincipalComponents, signed
from persona_ray.spec import Float32, Float64

CARRIED = 1.25
"""Directions carried, over the rank asked for."""
LONGEST = 4
"""Rows of a factor, over the rank asked for, before it is cut back."""


class Sizes(NamedTuple):
    """How long factors are, for a rank."""

    carried: int
    longest: int

    @classmethod
    def of(cls, rank: int) -> Self:
        """At least one row may always be added before the next cut."""
        carried = int(CARRIED * rank) + 1
        return cls(carried, max(LONGEST * rank, carried + 1))


@dataclass(frozen=True, slots=True)
class IncrementalPCA:
    """What is known of `count` rows, at L layers; float64. Mergeable: associative and commutative up to what cutting loses."""

    rank: int
    """Components that will be asked for."""
    count: int
    mean_LD: Float64
    total_L: Float64
    """Sum of squared distances from the mean, exact whatever was cut off."""
    factor_LMD: Float64
    """M rows; orthogonal to each other after a cut."""

    @classmethod
    def of(cls, rows_RLD: Float32, rank: int) -> Self:
        """State of these rows, R >= 0. Raises IntegrityError for NaN or Inf among them."""
        num_rows, num_layers, width = rows_RLD.shape
        if num_rows == 0:
            nothing = np.zeros((num_layers, width)), np.zeros(num_layers), np.zeros((num_layers, 0, width))
            return cls(rank, 0, *nothing)
        mean_LD, total_L = np.empty((num_layers, width)), np.empty(num_layers)
        rows_LRD = np.empty((num_layers, num_rows, width))
        for place, rows_RD in enumerate(rows_LRD):  # layer by layer, while it is in the cache
            rows_RD[...] = rows_RLD[:, place]
            mean_LD[place] = np.add.reduce(rows_RD, axis=0) / num_rows
            np.subtract(rows_RD, mean_LD[place], out=rows_RD)
            total_L[place] = np.vdot(rows_RD, rows_RD)
        if not np.isfinite(total_L).all():
            raise IntegrityError("rows hold NaN or Inf, or values so large that their squares overflow")
        return cls(rank, num_rows, mean_LD, total_L, rows_LRD)

    def merge(self, other: Self) -> Self:
        """State of the rows of both. Raises IntegrityError if ranks or shapes differ."""
        if (self.rank, self.mean_LD.shape) != (other.rank, other.mean_LD.shape):
            raise IntegrityError(f"a state of {self.mean_LD.shape} and rank {self.rank} and one of {other.mean_LD.shape} and {other.rank}")
        if not (self.count and other.count):
            return self if self.count else other
        count = self.count + other.count
        delta_LD = other.mean_LD - self.mean_LD
        shared = self.count * other.count / count
        between_L1D = np.sqrt(shared) * delta_LD[:, None]
        return type(self)(
            self.rank,
            count,
            self.mean_LD + delta_LD * (other.count / count),
            self.total_L + other.total_L + shared * (delta_LD**2).sum(axis=-1),
            _stacked((self.factor_LMD, other.factor_LMD, between_L1D), Sizes.of(self.rank)),
        )

    def short(self) -> Self:
        """With no more directions than are carried: small enough to be kept, and no worse than at the next cut."""
        carried = Sizes.of(self.rank).carried
        return self if self.factor_LMD.shape[1] <= carried else replace(self, factor_LMD=leading_of_each(self.factor_LMD, carried))

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Everything as arrays, float64 but for the number of rows, for keeping."""
        return {"count": np.array([self.count]), "mean": self.mean_LD, "total": self.total_L, "factor": self.factor_LMD}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[np.generic]], rank: int) -> Self:
        """The reverse, bit by bit. Raises KeyError for an array that is missing."""
        count, *numbers = (arrays[name] for name in ("count", "mean", "total", "factor"))
        mean_LD, total_L, factor_LMD = (values.astype(np.float64, copy=False) for values in numbers)
        return cls(rank, int(count[0]), mean_LD, total_L, factor_LMD)

    def components(self, toward_LD: Float64) -> PrincipalComponents:
        """At most `rank` components of the rows, signs as in `principal_components`.

        Variances of components are those of the factor; ratios are of the exact total variance. Raises NothingUsableError for
        fewer than two rows.
        """
        if self.count < 2:
            raise NothingUsableError(f"components of rollouts need two rows or more, and there are {self.count}")
        num_kept = min(self.rank, self.count - 1, self.factor_LMD.shape[1], self.factor_LMD.shape[2])
        factor_LKD = leading_of_each(self.factor_LMD, num_kept)
        length_LK = np.linalg.norm(factor_LKD, axis=-1)
        unit_LKD = np.divide(factor_LKD, length_LK[..., None], out=np.zeros_like(factor_LKD), where=length_LK[..., None] > 0)
        square_LK = length_LK**2
        total_L1 = self.total_L[:, None]
        return PrincipalComponents(
            mean_LD=self.mean_LD,
            scale_LD=np.ones_like(self.mean_LD),
            components_LKD=np.stack([signed(unit_KD, toward_D) for unit_KD, toward_D in zip(unit_LKD, toward_LD, strict=True)]),
            explained_variance_LK=square_LK / (self.count - 1),
            explained_variance_ratio_LK=np.divide(square_LK, total_L1, out=np.zeros_like(square_LK), where=total_L1 > 0),
        )


def _stacked(factors: Sequence[Float64], sizes: Sizes) -> Float64:
    """All of them in one, cut back to the carried directions, the largest, if it would be too long.

    Together, not each alone: small directions of the one that the other has, too, are not lost.
    """
    if sum(factor_LMD.shape[1] for factor_LMD in factors) < sizes.longest:
        return np.concatenate(factors, axis=1)
    if gpu.is_given():
        return gpu.leading(np.concatenate(factors, axis=1), sizes.carried)
    # Layer by layer: memory that was just given back is taken again, where that of all layers would have to be fetched anew.
    return np.stack([leading(np.concatenate(of_layer), sizes.carried) for of_layer in zip(*factors, strict=True)])


def leading_of_each(factor_LMD: Float64, number: int) -> Float64:
    """`leading` of every layer, on the GPU if this process was given one."""
    if gpu.is_given():
        return gpu.leading(factor_LMD, number)
    return np.stack([leading(factor_MD, number) for factor_MD in factor_LMD])


def leading(factor_MD: Float64, number: int) -> Float64:
    """The `number` rows s_k v_k of F = U S V^T with the largest s, by falling s; (number, D), or (M, D) if there are fewer.

    By the eigenvectors of F F^T: singular values below 1e-8 of the largest drown in rounding, far below what is carried.
    """
    if len(factor_MD) > factor_MD.shape[1]:
        return _leading_of_tall(factor_MD, number)
    _, vectors_MM = np.linalg.eigh(factor_MD @ factor_MD.T)
    rows_KD: Float64 = vectors_MM[:, ::-1][:, :number].T @ factor_MD
    return rows_KD


def _leading_of_tall(factor_MD: Float64, number: int) -> Float64:
    """More rows than dims: by the eigenvectors of F^T F."""
    values_D, vectors_DD = np.linalg.eigh(factor_MD.T @ factor_MD)
    lengths_K = np.sqrt(np.clip(values_D[::-1][:number], 0.0, None))
    rows_KD: Float64 = lengths_K[:, None] * vectors_DD[:, ::-1][:, :number].T
    return rows_KD
