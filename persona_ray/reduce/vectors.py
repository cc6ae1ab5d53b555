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
    defaults: Mapping[int, GroupMoments]
    """Default archetypes that have a row."""
    count_A: Int32
    """Rows that passed the filter; of a default archetype all rows."""

    @property
    def role_vectors(self) -> Float64:
        """One mean for every role, in the order of `roles`: (len(roles), L, D)."""
        return np.stack([moments.mean_LD for moments in self.roles.values()])

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
    count_A = np.zeros(num_archetypes, np.int32)
    for code, found in passed.items():
        count_A[code] = found.count
    return Vectors(
        roles={code: found for code, found in passed.items() if code not in default_codes and found.count >= keep.min_count},
        defaults={code: found for code, found in passed.items() if code in default_codes},
        count_A=count_A,
    )
