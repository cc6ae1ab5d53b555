"""The same experiment many times: every row that makes the axis, weighed in many ways, each of which gives an axis of its own.

One weighting is the experiment itself; two are its halves; some are its beginnings; the others are bootstrap replicates.
Replicates draw *questions*, not rows: answers to one question are alike, so rows are not independent, and an archetype's rows
and the default Assistant's change together. A question's weight in a replicate is Poisson(1), the limit of drawing with
replacement (Hanley and MacGibbon 2006), which needs no look at the other rows: one pass does, in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from persona_ray.errors import InputError
from persona_ray.spec import Float64, Reduced, digest_of

Ints = npt.NDArray[np.int64]

DEFAULT = 0
"""Group of the default Assistant's rows; the others are roles."""
BEGINNINGS = (1, 2, 5, 10, 20, 30, 50, 100, 200, 300, 500, 1000)
"""First rows of every archetype that are looked at alone."""
MIN_QUESTIONS = 2
NO_LIMIT = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedRows:
    """N rows that make the axis, by rising rollout."""

    rollout_N: Ints
    group_N: Ints
    """`DEFAULT`, or 1.. for the roles in the order of `roles`."""
    question_N: Ints
    """Identity of the question; any whole numbers."""
    ordinal_N: Ints
    """Stored rows of the same archetype before it, in work order, whether they count or not."""
    roles: tuple[int, ...]
    """Archetype codes that have a role vector."""

    @classmethod
    def of(
        cls, rollout_N: Ints, archetype_N: Ints, question_N: Ints, counts_N: npt.NDArray[np.bool_], groups: Mapping[int, int]
    ) -> CountedRows:
        """Of all stored rows by rising rollout: `counts_N` says which count, `groups` the group of each archetype code that has one."""
        ordinal_N = _ordinals(archetype_N)
        group_N = np.array([groups.get(code, -1) for code in archetype_N.tolist()], dtype=np.int64)
        kept_N = counts_N & (group_N >= 0)
        roles = {group: code for code, group in groups.items() if group != DEFAULT}
        return cls(
            rollout_N=rollout_N[kept_N],
            group_N=group_N[kept_N],
            question_N=question_N[kept_N].astype(np.int64),
            ordinal_N=ordinal_N[kept_N],
            roles=tuple(roles[group] for group in sorted(roles)),
        )

    @property
    def num_groups(self) -> int:
        """The default Assistant and the roles."""
        return 1 + len(self.roles)

    @property
    def num_questions(self) -> int:
        """Different ones."""
        return len(np.unique(self.question_N))


def counted_rows(
    reduced: Reduced, rollout_N: Ints, columns: Mapping[str, npt.NDArray[Any]], score_N: npt.NDArray[np.int8] | None
) -> CountedRows:
    """Those that made `reduced`, of all stored rows of its data by rising rollout, with their `archetype` and `question` columns.

    `score_N` None: without a judge, every row counts.
    """
    names = set(reduced.attributes["default_archetypes"])
    default_codes = [code for code, name in enumerate(reduced.archetypes) if name in names]
    role_codes = np.flatnonzero(np.isfinite(reduced.role_vector_ALD[:, 0]).all(axis=-1)).tolist()
    min_score = reduced.attributes["min_score"]
    passes_N = np.ones(len(rollout_N), dtype=bool) if score_N is None or min_score is None else score_N >= min_score
    is_default_N = np.isin(columns["archetype"], default_codes)
    groups = dict.fromkeys(default_codes, DEFAULT) | {code: group for group, code in enumerate(role_codes, start=1)}
    return CountedRows.of(rollout_N, columns["archetype"], columns["question"], passes_N | is_default_N, groups)


def _ordinals(archetype_N: Ints) -> Ints:
    """How many of the same archetype came before, for each."""
    order_N = np.argsort(archetype_N, kind="stable")
    _, first, count = np.unique(archetype_N[order_N], return_index=True, return_counts=True)
    ordinal_N = np.empty(len(archetype_N), dtype=np.int64)
    ordinal_N[order_N] = np.arange(len(archetype_N)) - np.repeat(first, count)
    return ordinal_N


@dataclass(frozen=True, slots=True, kw_only=True)
class Weightings:
    """C weightings of N rows. Picklable; a few megabytes for the paper's 331,200 rows."""

    rows: CountedRows
    question_N: Ints
    """Place of each row's question in `weight_QC`."""
    weight_QC: Float64
    """By question, the smallest first."""
    limit_C: Ints
    """Only rows with a smaller ordinal count."""
    total_GC: Float64
    """Sum of weights by group."""
    beginnings: tuple[int, ...]
    num_replicates: int

    @classmethod
    def of(cls, rows: CountedRows, num_replicates: int, seed: int) -> Weightings:
        """Whole, two halves, beginnings, replicates. Raises InputError for a single question: nothing can be drawn then."""
        questions, question_N = np.unique(rows.question_N, return_inverse=True)
        if len(questions) < MIN_QUESTIONS:
            raise InputError("reduce.bootstrap needs rows of two questions or more: it says how the axis would move with other questions")
        longest = int(rows.ordinal_N.max()) + 1
        beginnings = tuple(number for number in BEGINNINGS if number < longest)
        whole_QC = np.ones((len(questions), 1))
        weight_QC = np.hstack(
            [
                whole_QC,
                _halves(questions, seed),
                np.repeat(whole_QC, len(beginnings), axis=1),
                poisson_weights(questions, num_replicates, seed),
            ]
        )
        limit_C = np.full(weight_QC.shape[1], NO_LIMIT)
        limit_C[3 : 3 + len(beginnings)] = beginnings
        return cls(
            rows=rows,
            question_N=question_N,
            weight_QC=weight_QC,
            limit_C=limit_C,
            total_GC=_totals(rows, question_N, weight_QC, limit_C),
            beginnings=beginnings,
            num_replicates=num_replicates,
        )

    @property
    def num_questions(self) -> int:
        """Q."""
        return len(self.weight_QC)

    @property
    def num_weightings(self) -> int:
        """C."""
        return len(self.limit_C)

    @property
    def halves(self) -> slice:
        """Columns of the halves."""
        return slice(1, 3)

    @property
    def beginning_columns(self) -> slice:
        """Columns of `beginnings`."""
        return slice(3, 3 + len(self.beginnings))

    @property
    def replicates(self) -> slice:
        """Columns of the bootstrap."""
        return slice(3 + len(self.beginnings), self.num_weightings)

    def found(self, rollout_R: Ints) -> tuple[Ints, Ints]:
        """Which of these rows count: their places among them, and among `rows`."""
        places_R = np.searchsorted(self.rows.rollout_N, rollout_R).clip(max=len(self.rows.rollout_N) - 1)
        members_M = np.flatnonzero(self.rows.rollout_N[places_R] == rollout_R)
        return members_M, places_R[members_M]

    def weights(self, places_M: Ints) -> Float64:
        """(M, C) of rows at these places."""
        weight_MC: Float64 = self.weight_QC[self.question_N[places_M]] * (self.rows.ordinal_N[places_M][:, None] < self.limit_C)
        return weight_MC

    def shares(self, places_M: Ints) -> Float64:
        """(M, C): weight over its group's sum of weights, so that shares of a group add up to 1 in every weighting; 0 where it has none."""
        total_MC = self.total_GC[self.rows.group_N[places_M]]
        weight_MC = self.weights(places_M)
        return np.divide(weight_MC, total_MC, out=np.zeros_like(weight_MC), where=total_MC > 0)

    def axis_shares(self, places_M: Ints) -> Float64:
        """(M, C): what every row adds to the axis: default vector minus the unweighted mean of the role vectors that there are."""
        num_roles_C = np.maximum(1, (self.total_GC[1:] > 0).sum(axis=0))
        sign_MC = np.where(self.rows.group_N[places_M][:, None] == DEFAULT, 1.0, -1.0 / num_roles_C)
        share_MC: Float64 = self.shares(places_M) * sign_MC
        return share_MC

    @property
    def is_usable_C(self) -> npt.NDArray[np.bool_]:
        """Weightings that have rows of the default Assistant and of two roles."""
        usable_C: npt.NDArray[np.bool_] = (self.total_GC[DEFAULT] > 0) & ((self.total_GC[1:] > 0).sum(axis=0) >= 2)
        return usable_C


def poisson_weights(questions: Ints, num_replicates: int, seed: int) -> Float64:
    """(Q, B) whole numbers; those of a question depend on seed and question alone."""
    weights = [np.random.default_rng([seed, int(question)]).poisson(1.0, num_replicates) for question in questions]
    return np.array(weights, dtype=np.float64).reshape(len(questions), num_replicates)


def _halves(questions: Ints, seed: int) -> Float64:
    """(Q, 2): every question in one of two halves, drawn by hash; of an odd number the first half has one more."""
    order = sorted(range(len(questions)), key=lambda place: digest_of({"seed": seed, "question": int(questions[place])}))
    half_Q2 = np.zeros((len(questions), 2))
    half_Q2[order[::2], 0] = 1
    half_Q2[order[1::2], 1] = 1
    return half_Q2


def _totals(rows: CountedRows, question_N: Ints, weight_QC: Float64, limit_C: Ints) -> Float64:
    """(G, C) sums of weights; column by column, so that memory is that of the rows once."""
    columns: list[Any] = [
        np.bincount(rows.group_N, weight_QC[question_N, column] * (rows.ordinal_N < limit), rows.num_groups)
        for column, limit in enumerate(limit_C)
    ]
    return np.stack(columns, axis=1)
