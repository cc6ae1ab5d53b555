"""Rows on a direction: where each lies along the Assistant Axis, or along a principal component, and how rows of a kind are spread.

Lu et al. 2026, section 4, follow a conversation's drift in this way, one projection for each of the Assistant's turns.
Arrays and codes only; stores and files are unknown here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from persona_ray.reduce.axis import projections
from persona_ray.reduce.moments import GroupMoments
from persona_ray.spec import Float32, Float64


@dataclass(frozen=True, slots=True, kw_only=True)
class Direction:
    """One direction for each layer."""

    layers: tuple[int, ...]
    vector_LD: Float64
    """Any length; of the Assistant Axis its own, default vector minus mean of role vectors."""
    mean_role_LD: Float64 | None = None
    """Mean of the role vectors, from which places along the axis are counted. None: not known, or the direction is no axis."""

    def at(self, layers: Sequence[int]) -> Direction:
        """The same at some of its layers, in the order asked for. Raises KeyError for one that it lacks."""
        place_of = {layer: place for place, layer in enumerate(self.layers)}
        at = [place_of[layer] for layer in layers]
        mean_role_LD = None if self.mean_role_LD is None else self.mean_role_LD[at]
        return replace(self, layers=tuple(layers), vector_LD=self.vector_LD[at], mean_role_LD=mean_role_LD)

    def project(self, activations_RLD: Float32 | Float64) -> Float64:
        """Of rows x, x . v / ||v|| per layer: (R, L), in units of the residual stream, from its origin; 0 where the direction is 0."""
        return projections(activations_RLD, self.vector_LD)

    def places(self, projection_RL: Float64) -> Float64 | None:
        """The same counted from the mean role in lengths of the axis: 0 = mean role, 1 = default Assistant. None where not known."""
        if self.mean_role_LD is None:
            return None
        length_L = np.linalg.norm(self.vector_LD, axis=-1)
        from_mean_RL = projection_RL - self.project(self.mean_role_LD[None])
        place_RL: Float64 = np.divide(from_mean_RL, length_L, out=np.zeros_like(from_mean_RL), where=length_L > 0)
        return place_RL


@dataclass(slots=True)
class Spreads:
    """Number, mean and spread of projections by kind of row; memory does not depend on the number of rows."""

    by_kind: dict[tuple[int, int], GroupMoments] = field(default_factory=dict)
    """(Archetype code, which answer of its conversation) -> moments of (L, 1)."""

    def add(self, projection_RL: Float64, archetype_R: npt.NDArray[np.integer], answer_R: npt.NDArray[np.integer]) -> None:
        """Take in rows."""
        kinds_R2 = np.stack([archetype_R, answer_R], axis=1)
        for archetype, answer in np.unique(kinds_R2, axis=0).tolist():
            is_one_R = (archetype_R == archetype) & (answer_R == answer)
            found, kind = GroupMoments.of(projection_RL[is_one_R, :, None]), (archetype, answer)
            self.by_kind[kind] = self.by_kind[kind].merge(found) if kind in self.by_kind else found

    def by_archetype(self) -> dict[int, GroupMoments]:
        """Archetype code -> moments of all its rows."""
        return self._merged(0)

    def by_answer(self) -> dict[int, GroupMoments]:
        """1 for the first answer of a conversation, 2 for the second ... -> moments over all archetypes."""
        return self._merged(1)

    def _merged(self, part: int) -> dict[int, GroupMoments]:
        merged: dict[int, GroupMoments] = {}
        for kind in sorted(self.by_kind, key=lambda kind: kind[part]):
            key, found = kind[part], self.by_kind[kind]
            merged[key] = merged[key].merge(found) if key in merged else found
        return merged


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What rows are projected on, and where it comes from."""

    source: str
    """As people call it."""
    result: str | None
    """Name of the result; None: it comes from a file."""
    component: int | None
    """Number of the principal component; None: the axis."""
    model_id: str | None
    direction: Direction
    layer: int
    """The recommended one."""
    reason: str
    """Why that one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Projected:
    """What one pass over a store found."""

    target: Target
    layers: tuple[int, ...]
    spreads: Spreads
    direction: Direction
    """That of `target`, at `layers`."""
    archetypes: tuple[str, ...]
    """Names by code."""
    default_archetypes: tuple[str, ...]
    num_rows: int
    notes: tuple[str, ...]

    def by_archetype(self) -> dict[str, GroupMoments]:
        """Name -> moments of the projections of all its rows, (L, 1)."""
        return {self.archetypes[code]: found for code, found in self.spreads.by_archetype().items()}


def spread(moments: GroupMoments) -> Float64 | None:
    """Standard deviation of single rows, (L, 1), with count - 1 in the denominator; None for a single one."""
    return None if moments.count < 2 else np.sqrt(moments.m2_LD / (moments.count - 1))


def nth_answers(columns: Mapping[str, npt.NDArray[np.generic]]) -> npt.NDArray[np.int64]:
    """Which answer of its conversation each row is, by rising `turn`: (N,), the first is 1.

    `columns`: `archetype`, `system_prompt`, `question`, `sample` and `turn`, (N,) each; rows that share the first four are one
    conversation.
    """
    conversation_4N = np.stack([columns[name] for name in ("archetype", "system_prompt", "question", "sample")]).astype(np.int64)
    order_N = np.lexsort((columns["turn"], *conversation_4N))
    sorted_4N = conversation_4N[:, order_N]
    is_first_N = np.concatenate([[True], (sorted_4N[:, 1:] != sorted_4N[:, :-1]).any(axis=0)])[: len(order_N)]
    place_N = np.arange(len(order_N))
    answer_N = np.empty(len(order_N), dtype=np.int64)
    answer_N[order_N] = place_N - np.maximum.accumulate(np.where(is_first_N, place_N, 0)) + 1
    return answer_N
