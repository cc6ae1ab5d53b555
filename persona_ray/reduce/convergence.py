"""Whether the axis still moves: batch means over the balanced order of the work, from one pass, in bounded memory.

Rows come in an order in which any prefix is a valid smaller experiment. It is cut into consecutive batches, and the spread of
what the batches add to the axis tells how far the axis of all of them may be from the one that endlessly many would give
(batch means; with the batches as clusters, the cluster-robust variance of Liang and Zeger 1986). Batches of consecutive rows hold
other questions as long as there are new ones, and other prompts and samples of the same questions afterwards: the error that
going on with this very plan would still take away. When there are too many batches, neighbours are put together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from persona_ray.reduce.weightings import DEFAULT, Ints
from persona_ray.spec import Float32, Float64

NUM_BATCHES = 16
"""At most; at least half as many once there are enough rows."""
MIN_BATCHES = 4
GROWTH = 1.1
"""Rows per archetype from one look at the axis to the next one: looks that share nearly all of their rows say the same twice."""


@dataclass(slots=True)
class BatchMeans:
    """Sums of the rows that count, by group (`DEFAULT`, roles from 1) and batch, at L layers; float64."""

    num_groups: int
    shape: tuple[int, int]
    """(L, D)."""
    width: int = field(default=1, init=False)
    """Rows of an archetype in a batch, counted or not."""
    count_GK: Float64 = field(init=False)
    sum_GKLD: Float64 = field(init=False)

    def __post_init__(self) -> None:
        self.count_GK = np.zeros((self.num_groups, NUM_BATCHES))
        self.sum_GKLD = np.zeros((self.num_groups, NUM_BATCHES, *self.shape))

    def add(self, group_M: Ints, ordinal_M: Ints, rows_MLD: Float32) -> None:
        """Rows that count: `ordinal_M` says how many of the same archetype came before, counted or not."""
        if not len(group_M):
            return
        while ordinal_M.max() // self.width >= NUM_BATCHES:
            self._widen()
        batch_M = ordinal_M // self.width
        np.add.at(self.count_GK, (group_M, batch_M), 1.0)
        np.add.at(self.sum_GKLD, (group_M, batch_M), rows_MLD)

    def _widen(self) -> None:
        self.width *= 2
        for sums in (self.count_GK, self.sum_GKLD):
            pairs = sums[:, 0::2] + sums[:, 1::2]
            sums[:, : NUM_BATCHES // 2] = pairs
            sums[:, NUM_BATCHES // 2 :] = 0

    def look(self, min_count: int) -> Look | None:
        """The axis as it is; None with too few batches, no row of the default Assistant, or fewer than two roles of `min_count` rows."""
        count_G = self.count_GK.sum(axis=1)
        roles = 1 + np.flatnonzero(count_G[1:] >= min_count)
        used_K = np.flatnonzero(self.count_GK[DEFAULT] > 0)
        if not count_G[DEFAULT] or len(roles) < 2 or len(used_K) < MIN_BATCHES:
            return None
        groups = np.concatenate([[DEFAULT], roles])
        share_G = np.concatenate([[1.0], np.full(len(roles), -1.0 / len(roles))])
        mean_GLD = self.sum_GKLD[groups].sum(axis=1) / count_G[groups, None, None]
        axis_LD = np.tensordot(share_G, mean_GLD, axes=1)
        weight_G = share_G / count_G[groups]
        # What a batch adds beyond what it would add if its rows were all at their group's mean.
        added_KLD = np.tensordot(weight_G, self.sum_GKLD[groups], axes=1)
        expected_KLD = np.tensordot((weight_G[:, None] * self.count_GK[groups]).T, mean_GLD, axes=1)
        num_batches = len(used_K)
        variance_L = num_batches / (num_batches - 1) * ((added_KLD - expected_KLD) ** 2).sum(axis=(0, 2))
        return Look(axis_LD, variance_L)


@dataclass(frozen=True, slots=True)
class Look:
    """The axis after some rows."""

    axis_LD: Float64
    variance_L: Float64
    """Expected squared distance from the axis of endlessly many rows."""

    @property
    def cosine_L(self) -> Float64:
        """Expected cosine with that axis: noise of variance v in many dims adds v to the squared length, and nothing along the axis."""
        square_L = (self.axis_LD**2).sum(axis=-1)
        share_L = np.divide(self.variance_L, square_L, out=np.ones_like(square_L), where=square_L > 0)
        cosine_L: Float64 = np.sqrt(np.clip(1.0 - share_L, 0.0, 1.0))
        return cosine_L

    def cosine_with(self, other: Look) -> Float64:
        """Between both axes, (L,)."""
        norms_L = np.linalg.norm(self.axis_LD, axis=-1) * np.linalg.norm(other.axis_LD, axis=-1)
        dots_L = np.einsum("ld,ld->l", self.axis_LD, other.axis_LD)
        cosine_L: Float64 = np.divide(dots_L, norms_L, out=np.zeros_like(dots_L), where=norms_L > 0)
        return cosine_L


@dataclass(slots=True)
class LookRule:
    """When to look at the axis: with `min_per_archetype` rows at first, and whenever there is enough more to see. Ends nothing."""

    min_per_archetype: int
    _looked_at: int = field(default=0, init=False)

    def is_due(self, rows_per_archetype: int) -> bool:
        """Whether there is enough more to see than at the last look."""
        return rows_per_archetype >= max(self.min_per_archetype, GROWTH * self._looked_at)

    def take(self, look: Look | None, rows_per_archetype: int) -> bool:  # noqa: ARG002
        """What was seen; True once that is enough, which is never."""
        self._looked_at = rows_per_archetype
        return False


@dataclass(slots=True)
class StopRule(LookRule):
    """Holds still when at `patience` looks in a row both cosines reached `cosine` at every layer: with the past, and the expected one."""

    cosine: float
    patience: int
    num_held: int = field(default=0, init=False)
    _last: Look | None = field(default=None, init=False)

    def take(self, look: Look | None, rows_per_archetype: int) -> bool:
        """What was seen; True once the axis has held still for long enough."""
        last, self._last, self._looked_at = self._last, look, rows_per_archetype
        holds = look is not None and last is not None and self._holds(look, last)
        self.num_held = self.num_held + 1 if holds else 0
        return self.num_held >= self.patience

    def _holds(self, look: Look, last: Look) -> bool:
        return bool(np.minimum(look.cosine_L, look.cosine_with(last)).min() >= self.cosine)
