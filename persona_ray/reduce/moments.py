"""Count, mean and spread of the activations of every (archetype, score), merged from any pieces in any order.

Moments are all that the directions need of the rows: a new score filter or minimum count costs no second reading.
This file knows nothing of stores, judges, Ray or of which archetype is the default Assistant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from persona_ray.errors import IntegrityError
from persona_ray.spec import Float32, Float64, ScoredRows


class Group(NamedTuple):
    """The rows that are counted together."""

    archetype: int
    """The plan's code."""
    score: int
    """0..3, or -1 where no judge has spoken."""


@dataclass(frozen=True, slots=True)
class GroupMoments:
    """First two moments of some rows, per layer and per dim of the residual stream; float64."""

    count: int
    """Rows; at least 1."""
    mean_LD: Float64
    m2_LD: Float64
    """Sum of squared differences from the mean; 0 for a single row."""

    @classmethod
    def of(cls, rows_RLD: Float32) -> GroupMoments:
        """Two passes over `rows_RLD` (R >= 1), accumulated in float64."""
        values_RLD = rows_RLD.astype(np.float64)
        mean_LD = values_RLD.mean(axis=0)
        values_RLD -= mean_LD
        return cls(len(rows_RLD), mean_LD, np.einsum("rld,rld->ld", values_RLD, values_RLD))

    def merge(self, other: GroupMoments) -> GroupMoments:
        """Moments of both sets of rows together (Chan, Golub and LeVeque 1979). Raises IntegrityError if shapes differ."""
        if self.mean_LD.shape != other.mean_LD.shape:
            raise IntegrityError(f"rows of {self.mean_LD.shape} (layer, hidden) cannot be merged with rows of {other.mean_LD.shape}")
        count = self.count + other.count
        delta_LD = other.mean_LD - self.mean_LD
        return GroupMoments(
            count,
            self.mean_LD + delta_LD * (other.count / count),
            self.m2_LD + other.m2_LD + delta_LD**2 * (self.count * other.count / count),
        )


@dataclass(frozen=True, slots=True)
class Moments:
    """Moments of every group that has a row. Merging is associative and commutative up to rounding; `Moments({})` changes nothing."""

    groups: Mapping[Group, GroupMoments]

    @classmethod
    def of(cls, rows: ScoredRows) -> Moments:
        """Moments of one unit. Raises IntegrityError for a padding row, NaN or Inf among the rows."""
        groups: dict[Group, GroupMoments] = {}
        keys_R2 = np.stack([rows.archetype_R, rows.score_R], axis=1).astype(np.int64)
        for archetype, score in np.unique(keys_R2, axis=0).tolist():
            members_R = np.flatnonzero((rows.archetype_R == archetype) & (rows.score_R == score))
            if archetype < 0:
                raise IntegrityError(f"row {rows.rollout_R[members_R[0]]} is padding (archetype {archetype}) and cannot be reduced")
            members_RLD = rows.activations_RLD[members_R]
            if not np.isfinite(members_RLD).all():
                raise IntegrityError(_not_finite(rows))
            groups[Group(archetype, score)] = GroupMoments.of(members_RLD)
        return cls(groups)

    def merge(self, other: Moments) -> Moments:
        """Moments of the rows of both."""
        groups = dict(self.groups)
        for group, moments in other.groups.items():
            groups[group] = groups[group].merge(moments) if group in groups else moments
        return Moments(groups)

    @property
    def num_rows(self) -> int:
        """Rows in all groups."""
        return sum(moments.count for moments in self.groups.values())


def _not_finite(rows: ScoredRows) -> str:
    bad = np.flatnonzero(~np.isfinite(rows.activations_RLD).all(axis=(1, 2)))
    row = int(bad[0])
    layer = int(np.flatnonzero(~np.isfinite(rows.activations_RLD[row]).all(axis=1))[0])
    return (
        f"row {rows.rollout_R[row]} holds NaN or Inf (position {layer} in the layer dim), as {len(bad)} of the {len(rows.rollout_R)} rows "
        "read with it do, although it is marked as stored. Run `persona-ray store verify` on this store."
    )
