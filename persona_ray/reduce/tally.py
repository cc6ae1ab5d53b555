"""Moments with the rows that they are of, so that they can be kept and follow the rows when a judge thinks otherwise.

When scores change, rows change groups. Most of a group mostly goes the same way: it is renamed without reading anything, and
only the rows that go elsewhere are read again, taken out of one group and put into another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from persona_ray.reduce.moments import Group, GroupMoments, Moments
from persona_ray.spec import Int32, ScoredRows

Ints = npt.NDArray[np.int64]
Scores = npt.NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class Tally:
    """Moments of N rows, and which rows in which group; in any order. Mergeable."""

    moments: Moments
    rollout_N: Ints
    archetype_N: Int32
    score_N: Scores

    @classmethod
    def of(cls, rows: ScoredRows) -> Tally:
        """Of one unit. Raises IntegrityError for a padding row, NaN or Inf among the rows."""
        return cls(Moments.of(rows), rows.rollout_R, rows.archetype_R, rows.score_R)

    @classmethod
    def nothing(cls) -> Tally:
        """Of no rows: merging it changes nothing."""
        return cls(Moments({}), np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.int8))

    def merge(self, other: Tally) -> Tally:
        """Of the rows of both."""
        return Tally(
            self.moments.merge(other.moments),
            np.concatenate([self.rollout_N, other.rollout_N]),
            np.concatenate([self.archetype_N, other.archetype_N]),
            np.concatenate([self.score_N, other.score_N]),
        )

    def in_order(self) -> Tally:
        """Rows by rising rollout."""
        order_N = np.argsort(self.rollout_N, kind="stable")
        return Tally(self.moments, self.rollout_N[order_N], self.archetype_N[order_N], self.score_N[order_N])

    # ---- as arrays, for keeping

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Everything as arrays: the rows (N,), and by group G: archetype, score and count (G,), mean and m2 (G, L, D) float64."""
        groups = sorted(self.moments.groups.items())
        return {
            "rollout": self.rollout_N,
            "archetype": self.archetype_N,
            "score": self.score_N,
            "group": np.array([[*group] for group, _ in groups], dtype=np.int64).reshape(len(groups), 2),
            "count": np.array([found.count for _, found in groups], dtype=np.int64),
            "mean": np.stack([found.mean_LD for _, found in groups]),
            "m2": np.stack([found.m2_LD for _, found in groups]),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[np.generic]]) -> Tally:
        """The reverse. Raises KeyError for an array that is missing."""
        counted = zip(arrays["group"].tolist(), arrays["count"].tolist(), arrays["mean"], arrays["m2"], strict=True)
        groups = {Group(*group): GroupMoments(count, mean_LD, m2_LD) for group, count, mean_LD, m2_LD in counted}
        rows = arrays["rollout"].astype(np.int64), arrays["archetype"].astype(np.int32), arrays["score"].astype(np.int8)
        return cls(Moments(groups), *rows)

    # ---- another judge, or the same one who has said more

    def rescoring(self, score_N: Scores) -> Rescoring:
        """What it takes to have these scores instead."""
        renamed: dict[Group, Group] = {}
        is_moved_N = np.zeros(len(self.rollout_N), dtype=bool)
        for group in self.moments.groups:
            members_M = np.flatnonzero((self.archetype_N == group.archetype) & (self.score_N == group.score))
            scores, counts = np.unique(score_N[members_M], return_counts=True)
            most = int(scores[counts.argmax()])
            renamed[group] = Group(group.archetype, most)
            is_moved_N[members_M] = score_N[members_M] != most
        return Rescoring(renamed, self.rollout_N[is_moved_N], self.score_N[is_moved_N], score_N[is_moved_N])

    def rescored(self, score_N: Scores, rescoring: Rescoring, moved: Moved) -> Tally:
        """The tally with these scores; `moved` are the moments of the rows of `rescoring(score_N)`."""
        stayed = self.moments.without(moved.leaving).regrouped(rescoring.renamed)
        return Tally(stayed.merge(moved.arriving), self.rollout_N, self.archetype_N, score_N)


@dataclass(frozen=True, slots=True)
class Rescoring:
    """Which groups get another name, and which M rows do not go with theirs."""

    renamed: Mapping[Group, Group]
    rollout_M: Ints
    before_M: Scores
    after_M: Scores


@dataclass(frozen=True, slots=True)
class Moved:
    """Moments of rows that change groups, in the groups that they leave and in those that they join. Mergeable."""

    leaving: Moments
    arriving: Moments

    @classmethod
    def of(cls, rows: ScoredRows, rescoring: Rescoring) -> Moved:
        """Of those of `rows` that move; their own scores are not looked at."""
        _, here_M, there_M = np.intersect1d(rows.rollout_R, rescoring.rollout_M, assume_unique=True, return_indices=True)
        sides = [
            ScoredRows(rows.rollout_R[here_M], rows.archetype_R[here_M], score_M[there_M], rows.activations_RLD[here_M])
            for score_M in (rescoring.before_M, rescoring.after_M)
        ]
        return cls(*map(Moments.of, sides))

    @classmethod
    def nothing(cls) -> Moved:
        """No row moves."""
        return cls(Moments({}), Moments({}))

    def merge(self, other: Moved) -> Moved:
        """Of the rows of both."""
        return Moved(self.leaving.merge(other.leaving), self.arriving.merge(other.arriving))
