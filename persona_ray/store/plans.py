"""What a store is meant to hold: all its plans together, and the sets of layers. Everything else in it follows from this."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from persona_ray.errors import InputError, IntegrityError
from persona_ray.spec import Plan, RowKey, digest_of
from persona_ray.store.backend import Backend
from persona_ray.store.layers_file import LAYERS_FOLDER, LayersFile, layers_key, number_of_layers_key
from persona_ray.store.plan_file import PLANS_FOLDER, PlanFile, number_of_plan_key, plan_as_dict, plan_key


@dataclass(frozen=True)
class Plans:
    """A store's plans in order. Units of one plan follow each other; between two plans units may be left out."""

    files: tuple[PlanFile, ...]
    """At least one."""
    further_layers: tuple[LayersFile, ...] = ()

    @property
    def first(self) -> PlanFile:
        """The one that began the store; identity, unit rows and dates are its."""
        return self.files[0]

    @property
    def identity(self) -> dict[str, Any]:
        """`Identity.as_dict()` of the store."""
        return self.first.identity

    @cached_property
    def identity_digest(self) -> str:
        """SHA-256, equal to `Identity.digest`."""
        return digest_of(self.identity)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all rows, codes, unit borders and sets of layers."""
        return digest_of([*(plan_as_dict(file.plan) for file in self.files), *self.layer_sets])

    @property
    def unit_rows(self) -> int:
        """Places of a unit, padding included."""
        return self.first.plan.unit_rows

    @property
    def chunk_units(self) -> int:
        """Units in a chunk of the planned columns."""
        return self.first.chunk_units

    @property
    def layer_sets(self) -> tuple[tuple[int, ...], ...]:
        """Captured decoder blocks by set, each in the order of its array's layer dim."""
        return (tuple(self.identity["layers"]), *(file.layers for file in self.further_layers))

    @property
    def layers(self) -> tuple[int, ...]:
        """All of them, rising."""
        return tuple(sorted(layer for layers in self.layer_sets for layer in layers))

    @property
    def hidden_size(self) -> int:
        """Model width."""
        return int(self.identity["hidden_size"])

    def set_of(self, layers: Sequence[int]) -> int:
        """Number of the set with exactly these layers. Raises InputError if there is none."""
        if tuple(layers) not in self.layer_sets:
            raise InputError(f"no array has exactly the layers {list(layers)}; there are {[list(has) for has in self.layer_sets]}")
        return self.layer_sets.index(tuple(layers))

    @property
    def archetypes(self) -> tuple[str, ...]:
        """Names; the position is the code. A further plan only adds to the list."""
        return self.files[-1].plan.archetypes

    @property
    def default_archetypes(self) -> tuple[str, ...]:
        """Those that are the default Assistant."""
        return self.files[-1].plan.default_archetypes

    @property
    def num_rows(self) -> int:
        """Rows asked for, padding not counted."""
        return sum(len(file.plan.keys) for file in self.files)

    @property
    def num_units(self) -> int:
        """Units with rows."""
        return sum(file.plan.num_units for file in self.files)

    @property
    def units(self) -> tuple[int, ...]:
        """Units with rows, rising."""
        return tuple(unit for file in self.files for unit in file.plan.units)

    @property
    def padded_rows(self) -> int:
        """Length of the rollout dim."""
        return self.files[-1].plan.units.stop * self.unit_rows

    def __contains__(self, unit: int) -> bool:
        """Whether the unit has rows."""
        return unit in self.plan_of(unit).units

    def plan_of(self, unit: int) -> Plan:
        """The plan on whose side of the borders `unit` lies, also if that plan ends before it."""
        return self.files[max(0, bisect_right(self._borders, unit) - 1)].plan

    def rows(self, unit: int) -> range:
        """The real rows of `unit` on the rollout dim, padding left out."""
        plan = self.plan_of(unit)
        start = unit * self.unit_rows
        end_of_plan = plan.first_unit * self.unit_rows + len(plan.keys)
        return range(start, min(start + self.unit_rows, end_of_plan))

    def keys(self, unit: int) -> tuple[RowKey, ...]:
        """Of those rows, in order."""
        return self.plan_of(unit).keys[self._places(unit)]

    def text_digests(self, unit: int) -> tuple[str, ...]:
        """Of those rows, in order; empty if the plan recorded none."""
        return self.plan_of(unit).text_digests[self._places(unit)]

    def unit_of(self, row: int) -> int:
        """The unit of a row of the rollout dim."""
        return row // self.unit_rows

    def _places(self, unit: int) -> slice:
        rows, first = self.rows(unit), self.plan_of(unit).first_unit * self.unit_rows
        return slice(rows.start - first, rows.stop - first)

    @cached_property
    def _borders(self) -> list[int]:
        return [file.plan.first_unit for file in self.files]


def read_plans(backend: Backend) -> Plans:
    """All plans of the store at `backend`: two listings and a GET for each. Raises InputError if there is no store."""
    plans = find_plans(backend)
    if plans is None:
        raise InputError(f"{backend.url}: no persona_ray store here ({plan_key(0)} is missing); check the path or URL")
    return plans


def find_plans(backend: Backend) -> Plans | None:
    """`read_plans`, or None if there is no store."""
    # Plans last: a set of layers is claimed for units that are there, so whoever sees the set sees their plans.
    layers = _numbered(backend, LAYERS_FOLDER, number_of_layers_key, layers_key, first=1)
    found = _numbered(backend, PLANS_FOLDER, number_of_plan_key, plan_key, first=0)
    if not found:
        return None
    return Plans(
        tuple(PlanFile.from_bytes(data, f"{backend.url}: {key}") for key, data in found),
        tuple(LayersFile.from_bytes(data, f"{backend.url}: {key}") for key, data in layers),
    )


def claimed_keys(backend: Backend) -> frozenset[str]:
    """What `read_plans` would read now: two listings."""
    layers = (key for key in backend.list_keys(LAYERS_FOLDER) if number_of_layers_key(key) is not None)
    plans = (key for key in backend.list_keys(PLANS_FOLDER) if number_of_plan_key(key) is not None)
    return frozenset([*layers, *plans])


def keys_of(plans: Plans) -> frozenset[str]:
    """What `plans` were read from."""
    sets = (layers_key(number) for number in range(1, len(plans.layer_sets)))
    return frozenset([*sets, *(plan_key(number) for number in range(len(plans.files)))])


def _numbered(
    backend: Backend, folder: str, number_of: Callable[[str], int | None], key_of: Callable[[int], str], *, first: int
) -> Sequence[tuple[str, bytes]]:
    """Key and bytes by rising number. Raises IntegrityError if a number is left out: it was deleted, for they are claimed in turn."""
    numbers = sorted(_known(map(number_of, backend.list_keys(folder))))
    expected = range(first, first + len(numbers))
    if numbers != list(expected):
        gone = next(number for number in expected if number not in numbers)
        raise IntegrityError(f"{backend.url}: {key_of(gone)} is missing, and later ones are there; bring it back from a copy")
    keys = [key_of(number) for number in numbers]
    return list(zip(keys, backend.get_many(keys), strict=True))


def _known(numbers: Iterable[int | None]) -> Iterable[int]:
    return (number for number in numbers if number is not None)
