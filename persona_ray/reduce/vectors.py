"""Role vectors and the default vector: which rows count, and their means.

A role vector is the mean activation of an archetype over its rows that pass the score filter (Lu et al. 2026, section
2.1; score 3 is "fully role-playing"); the default vector is the mean over all rows of the default Assistant, whatever
their score. The file knows nothing of names: archetypes are codes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import reduce

import numpy as np

from persona_ray.reduce.moments import GroupMoments, Moments
from persona_ray.spec import Float64, Int32

SOMEWHAT = 2
"""The score of "somewhat role-playing" answers, which make vectors of their own."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which rows make a role vector, and how many it takes."""

    min_score: int | None
    """Lowest score that counts, 0..3; None: no judge, every row counts."""
    min_count: int
    """An archetype with fewer rows that count has no role vector."""

    def passes(self, score: int) -> bool:
        """Whether rows of this score count. A row without a score (-1) counts only without a judge."""
        return self.min_score is None or score >= self.min_score


@dataclass(frozen=True, slots=True)
class Vectors:
    """Moments of the rows that count, by archetype code."""

    roles: Mapping[int, GroupMoments]
    """Archetypes that have a role vector, by rising code; never the default Assistant."""
    somewhat: Mapping[int, GroupMoments]
    """Archetypes that have a vector of rows of score `SOMEWHAT` alone, by rising code; none without a judge."""
    defaults: Mapping[int, GroupMoments]
    """Default archetypes that have a row."""
    count_A: Int32
    """Rows that passed the filter; of a default archetype all rows."""

    @property
    def role_vectors(self) -> Float64:
        """One mean for every role, in the order of `roles`: (len(roles), L, D)."""
        return _means(self.roles, self.default_vector)

    @property
    def somewhat_vectors(self) -> Float64:
        """The same for `somewhat`; (0, L, D) if there is none."""
        return _means(self.somewhat, self.default_vector)

    @property
    def default_vector(self) -> Float64:
        """Mean over all rows of all default archetypes: (L, D)."""
        return reduce(GroupMoments.merge, self.defaults.values()).mean_LD


def select_vectors(moments: Moments, *, num_archetypes: int, default_codes: Collection[int], keep: Filter) -> Vectors:
    """The rows that count, by archetype. The default Assistant is not filtered."""
    passed: dict[int, GroupMoments] = {}
    for group in sorted(moments.groups):
        if group.archetype in default_codes or keep.passes(group.score):
            found = moments.groups[group]
            passed[group.archetype] = passed[group.archetype].merge(found) if group.archetype in passed else found
    is_apart = keep.min_score is not None and keep.min_score > SOMEWHAT
    somewhat = {group.archetype: found for group, found in moments.groups.items() if is_apart and group.score == SOMEWHAT}
    count_A = np.zeros(num_archetypes, np.int32)
    for code, found in passed.items():
        count_A[code] = found.count
    return Vectors(
        roles=_enough(passed, default_codes, keep),
        somewhat=_enough(somewhat, default_codes, keep),
        defaults={code: found for code, found in passed.items() if code in default_codes},
        count_A=count_A,
    )


def _enough(found: Mapping[int, GroupMoments], default_codes: Collection[int], keep: Filter) -> dict[int, GroupMoments]:
    return {code: found[code] for code in sorted(found) if code not in default_codes and found[code].count >= keep.min_count}


def _means(found: Mapping[int, GroupMoments], like_LD: Float64) -> Float64:
    return np.stack([moments.mean_LD for moments in found.values()]) if found else np.empty((0, *like_LD.shape))


def standard_error(moments: GroupMoments) -> Float64:
    """How far the mean of these rows may be from that of endlessly many: root of sum_d var_d / count, (L,); NaN for a single row.

    In units of the residual stream. Rows count as independent, though answers to one question are alike: it says who needs more
    rows, not how sure the axis is (that is the bootstrap's).
    """
    if moments.count < 2:
        return np.full(len(moments.mean_LD), np.nan)
    error_L: Float64 = np.sqrt(moments.m2_LD.sum(axis=-1) / (moments.count * (moments.count - 1)))
    return error_L
