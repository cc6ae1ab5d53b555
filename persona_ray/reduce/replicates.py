"""Axes and positions of many weightings of the rows, in one pass each: sums that merge from any pieces in any order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from persona_ray.reduce.weightings import Weightings
from persona_ray.spec import Float64, ScoredRows


@dataclass(frozen=True, slots=True)
class ReplicateAxes:
    """The part of every weighting's axis that comes from some rows; float64."""

    axis_CLD: Float64

    @classmethod
    def of(cls, rows: ScoredRows, weightings: Weightings) -> ReplicateAxes:
        """Of those of `rows` that count."""
        members_M, places_M = weightings.found(rows.rollout_R)
        values_MLD = rows.activations_RLD[members_M].astype(np.float64)
        return cls(np.tensordot(weightings.axis_shares(places_M).T, values_MLD, axes=1))

    def merge(self, other: ReplicateAxes) -> ReplicateAxes:
        """Of the rows of both."""
        return ReplicateAxes(self.axis_CLD + other.axis_CLD)

    @property
    def unit_CLD(self) -> Float64:
        """Directions; 0 where an axis is 0."""
        norm_CL1 = np.linalg.norm(self.axis_CLD, axis=-1, keepdims=True)
        unit_CLD: Float64 = np.divide(self.axis_CLD, norm_CL1, out=np.zeros_like(self.axis_CLD), where=norm_CL1 > 0)
        return unit_CLD


@dataclass(frozen=True, slots=True)
class ReplicatePositions:
    """The part of every group's position along each weighting's own axis that comes from some rows; in units of the residual stream."""

    position_GCL: Float64

    @classmethod
    def of(cls, rows: ScoredRows, weightings: Weightings, unit_CLD: Float64) -> ReplicatePositions:
        """Of those of `rows` that count; `unit_CLD` are the directions of all weightings, from a pass before."""
        members_M, places_M = weightings.found(rows.rollout_R)
        share_MC = weightings.shares(places_M)
        dots_MCL = np.einsum("mld,cld->mcl", rows.activations_RLD[members_M].astype(np.float64), unit_CLD, optimize=True)
        position_GCL = np.zeros((weightings.rows.num_groups, *dots_MCL.shape[1:]))
        np.add.at(position_GCL, weightings.rows.group_N[places_M], share_MC[:, :, None] * dots_MCL)
        return cls(position_GCL)

    def merge(self, other: ReplicatePositions) -> ReplicatePositions:
        """Of the rows of both."""
        return ReplicatePositions(self.position_GCL + other.position_GCL)
