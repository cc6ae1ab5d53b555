"""The words of a verification, and the store as one listing showed it. Values; reads the plans, the listing and the quarantine."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from persona_ray.store.backend import Backend
from persona_ray.store.layout import (
    UNIT_COLUMNS,
    ArraySpec,
    activations_name,
    chunk_key,
    committed_name,
    parquet_key,
    score_array,
    unit_arrays,
)
from persona_ray.store.plans import Plans, read_plans
from persona_ray.store.quarantine import condemned_objects
from persona_ray.store.scores import raw_key


class Kind(enum.StrEnum):
    """What is wrong with an object."""

    MISSING = "missing"
    CORRUPT = "corrupt"


class State(enum.StrEnum):
    """What became of a unit."""

    OK = "ok"
    CORRUPT = "corrupt"
    MISSING = "missing"
    """Its marker is there, objects are not; what is left is right."""
    NOT_WRITTEN = "not yet written"


@dataclass(frozen=True, slots=True)
class Flaw:
    """One object that is not what it must be."""

    key: str
    kind: Kind
    problem: str
    """What differs."""


@dataclass(frozen=True, slots=True)
class UnitReport:
    """What was found of a unit."""

    unit: int
    state: State
    flaws: tuple[Flaw, ...]
    """Marker first, then in the order of writing; the `committed` chunk and scores last."""
    refused: Mapping[int, str]
    """Row index in the store -> reason, by the marker."""
    notes: tuple[str, ...]
    """What is no fault, and good to know."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What is there, and what units must be."""

    backend: Backend
    plans: Plans
    arrays: Mapping[str, ArraySpec]
    keys: frozenset[str]
    """Every object; more may have come since."""
    judges: tuple[str, ...]
    condemned: Mapping[str, frozenset[str]]
    """Key -> SHA-256 of bytes that a requeue found damaged."""

    @classmethod
    def of(cls, backend: Backend) -> Survey:
        """Raises InputError if there is no store, IntegrityError if its plans cannot be read."""
        keys = frozenset(backend.list_keys(""))
        plans = read_plans(backend)  # after the listing: so every unit that it shows is in a plan
        judges = {parts[1] for key in keys if len(parts := key.split("/")) > 3 and parts[0] == "scores"}
        return cls(backend, plans, unit_arrays(plans), keys, tuple(sorted(judges)), condemned_objects(backend, keys))

    def has(self, key: str) -> bool:
        """Whether it is there by now: a listing of a store that grows can show an object without one that was written before it."""
        return key in self.keys or self.backend.get_or_none(key) is not None

    @property
    def layer_sets(self) -> range:
        """Numbers of the sets of layers; 0 is the one that the store began with."""
        return range(len(self.plans.layer_sets))

    def own_keys(self, unit: int, layer_set: int = 0) -> tuple[str, ...]:
        """Objects that the unit's marker names, in the order of writing: text, numbers, and for set 0 the columns."""
        names = (activations_name(layer_set), *(UNIT_COLUMNS if layer_set == 0 else ()))
        return (parquet_key(unit), *(chunk_key(self.arrays[name], unit) for name in names))

    def committed_key(self, unit: int, layer_set: int = 0) -> str:
        """The unit's part of the mask."""
        return chunk_key(self.arrays[committed_name(layer_set)], unit)

    def score_keys(self, judge: str, unit: int) -> tuple[str, str]:
        """Raw answers and scores, in the order of writing."""
        return raw_key(judge, unit), chunk_key(score_array(self.plans, judge), unit)
