"""How sure the axis is: its cone, agreement of halves, the rows that would have done, and intervals of positions and ranks.

All numbers say how the result would move if other questions of the same kind had been asked; not what another catalogue of
archetypes, another judge or another sampling seed for the same texts would do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from persona_ray.reduce.replicates import ReplicateAxes, ReplicatePositions
from persona_ray.reduce.weightings import DEFAULT, Weightings
from persona_ray.spec import CertainPosition, Certainty, Float64

MIN_USABLE = 10
"""Replicates with an axis."""
SAME_COSINE = 0.99
"""From here on two axes are called the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisCertainty:
    """Of the axis at each of L layers."""

    cone_degrees_L: Float64
    """The true axis lies within this angle of ours, with the confidence asked for."""
    split_half_cosine_L: Float64
    """Between the axes of two halves of the questions; NaN if a half has none."""
    beginnings: tuple[int, ...]
    """Rows per archetype."""
    beginning_cosine_PL: Float64
    """Between the axis of so many first rows of every archetype and that of all rows; NaN where there is none."""

    def rows_needed(self, position: int) -> int | None:
        """Rows per archetype from which on the axis at this layer stayed the same (`SAME_COSINE`); None: only all of them will do."""
        enough: int | None = None
        for number, cosine in zip(reversed(self.beginnings), self.beginning_cosine_PL[::-1, position], strict=True):
            if not cosine >= SAME_COSINE:  # NaN is not enough either
                break
            enough = number
        return enough


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionIntervals:
    """Of the default Assistant (place 0) and every role, at each of L layers."""

    position_GL: Float64
    low_GL: Float64
    high_GL: Float64
    rank_low_GL: Float64
    """Among the roles, 1 is the most Assistant-like; NaN for the default Assistant."""
    rank_high_GL: Float64


def axis_certainty(axes: ReplicateAxes, weightings: Weightings, confidence: float) -> AxisCertainty:
    """Cone: the `confidence` quantile of the angle between replicate axes and the axis, widened for the number of questions."""
    unit_CLD = axes.unit_CLD
    cosine_CL = np.einsum("cld,ld->cl", unit_CLD, unit_CLD[0]).clip(-1, 1)
    cosine_CL[~weightings.is_usable_C] = np.nan
    halves_2LD = np.where(weightings.is_usable_C[weightings.halves, None, None], unit_CLD[weightings.halves], np.nan)
    angle_BL = np.degrees(np.arccos(cosine_CL[_drawn(weightings)]))
    return AxisCertainty(
        cone_degrees_L=np.minimum(180.0, np.quantile(angle_BL, confidence, axis=0) * _widening(weightings)),
        split_half_cosine_L=np.einsum("ld,ld->l", *halves_2LD),
        beginnings=weightings.beginnings,
        beginning_cosine_PL=cosine_CL[weightings.beginning_columns],
    )


def position_intervals(positions: ReplicatePositions, weightings: Weightings, confidence: float) -> PositionIntervals:
    """Positions: the basic (pivotal) bootstrap interval, which takes the replicates' bias out (Davison and Hinkley 1997, section 5.2).

    Ranks: quantiles of the replicates' ranks. A replicate that drew no row of a role says nothing of that role.
    """
    position_GCL = np.where((weightings.total_GC > 0)[:, :, None], positions.position_GCL, np.nan)
    drawn_GBL = position_GCL[:, _drawn(weightings)]
    position_GL = position_GCL[:, 0]
    tail = (1 - confidence) / 2
    shift_GBL = (drawn_GBL - position_GL[:, None]) * _widening(weightings)
    rank_GBL = np.full_like(drawn_GBL, np.nan)
    rank_GBL[1:] = 1 + (drawn_GBL[None, 1:] > drawn_GBL[1:, None]).sum(axis=1)
    rank_GBL[np.isnan(drawn_GBL)] = np.nan
    rank_low_RL, rank_high_RL = np.nanquantile(rank_GBL[1:], [tail, 1 - tail], axis=1, method="nearest")
    nothing_1L = np.full((1, position_GL.shape[1]), np.nan)
    return PositionIntervals(
        position_GL=position_GL,
        low_GL=position_GL - np.nanquantile(shift_GBL, 1 - tail, axis=1),
        high_GL=position_GL - np.nanquantile(shift_GBL, tail, axis=1),
        rank_low_GL=np.vstack([nothing_1L, rank_low_RL]),
        rank_high_GL=np.vstack([nothing_1L, rank_high_RL]),
    )


def certainty_of(
    axes: ReplicateAxes, positions: ReplicatePositions, weightings: Weightings, *, layer: int, names: Sequence[str], confidence: float
) -> Certainty | None:
    """All of it, for the one layer that `axes` and `positions` are of. `names` are those of all archetypes by code.

    None if too few replicates have an axis (or a role has rows in none of them): of so few questions nothing can be told.
    """
    if len(_drawn(weightings)) < MIN_USABLE:
        return None
    certainty = axis_certainty(axes, weightings, confidence)
    intervals = position_intervals(positions, weightings, confidence)
    if np.isnan(intervals.low_GL).any():
        return None
    return Certainty(
        layer=layer,
        confidence=confidence,
        num_replicates=len(_drawn(weightings)),
        num_questions=weightings.num_questions,
        cone_degrees=_short(certainty.cone_degrees_L[0]),
        split_half_cosine=_known(certainty.split_half_cosine_L[0]),
        rows_per_archetype=certainty.beginnings,
        cosine_with_all_rows=tuple(map(_known, certainty.beginning_cosine_PL[:, 0])),
        rows_needed=certainty.rows_needed(0),
        default=_interval(intervals, DEFAULT),
        roles={names[code]: _interval(intervals, group) for group, code in enumerate(weightings.rows.roles, start=1)},
    )


def _interval(intervals: PositionIntervals, group: int) -> CertainPosition:
    ranks = intervals.rank_low_GL[group, 0], intervals.rank_high_GL[group, 0]
    return CertainPosition(
        _short(intervals.position_GL[group, 0]),
        _short(intervals.low_GL[group, 0]),
        _short(intervals.high_GL[group, 0]),
        *(None if np.isnan(rank) else int(rank) for rank in ranks),
    )


def _drawn(weightings: Weightings) -> Any:
    """Columns of the replicates that have an axis."""
    columns = np.arange(weightings.num_weightings)[weightings.replicates]
    return columns[weightings.is_usable_C[columns]]


def _widening(weightings: Weightings) -> float:
    """Replicates of Q questions vary by (Q - 1) / Q of the variance that Q new questions would have."""
    num_questions = weightings.num_questions
    return math.sqrt(num_questions / (num_questions - 1))


def _known(value: float) -> float | None:
    return None if np.isnan(value) else _short(value)


def _short(value: float) -> float:
    """Six significant digits."""
    return float(f"{value:.6g}")
