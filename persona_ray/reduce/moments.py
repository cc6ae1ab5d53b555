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
    def of(cls, rows_RLD: Float32 | Float64) -> GroupMoments:
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

    def without(self, part: GroupMoments) -> GroupMoments:
        """The reverse of `merge`: moments of the rows that are left when those of `part` go; at least one must be left.

        What is left loses digits where little is: keep the larger part. Raises IntegrityError if more would go than there is.
        """
        count = self.count - part.count
        if count < 1 or self.mean_LD.shape != part.mean_LD.shape:
            raise IntegrityError(f"{part.count} rows of {part.mean_LD.shape} cannot be taken out of {self.count} of {self.mean_LD.shape}")
        mean_LD = self.mean_LD + (self.mean_LD - part.mean_LD) * (part.count / count)
        delta_LD = part.mean_LD - mean_LD
        m2_LD = self.m2_LD - part.m2_LD - delta_LD**2 * (count * part.count / self.count)
        return GroupMoments(count, mean_LD, np.maximum(m2_LD, 0.0))


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

    def without(self, part: Moments) -> Moments:
        """Moments of the rows that are left when those of `part` go. Raises IntegrityError if some of them are not there."""
        groups = dict(self.groups)
        for group, moments in part.groups.items():
            there = groups.pop(group, None)
            if there is None:
                raise IntegrityError(f"{moments.count} rows of {group} cannot be taken out: there are none")
            if there.count != moments.count:
                groups[group] = there.without(moments)
        return Moments(groups)

    def regrouped(self, to: Mapping[Group, Group]) -> Moments:
        """Groups under other names; those that share one are merged. A group that `to` does not have keeps its own."""
        groups: dict[Group, GroupMoments] = {}
        for group in sorted(self.groups):
            name, moments = to.get(group, group), self.groups[group]
            groups[name] = groups[name].merge(moments) if name in groups else moments
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
