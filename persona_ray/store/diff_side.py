"""One of two stores that are compared, as it is when the comparison begins: which rows it has, and with which layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from persona_ray.spec import RowKey
from persona_ray.store.marker import Marker
from persona_ray.store.plans import Plans
from persona_ray.store.reader import StoreReader


@dataclass(frozen=True, slots=True)
class Side:
    """A store with its markers as they were at the beginning."""

    store: StoreReader
    plans: Plans
    markers: Sequence[Mapping[int, Marker]]
    """By set of layers."""
    rows: Mapping[RowKey, int]
    """Rows of committed units, rising."""

    @classmethod
    def of(cls, store: StoreReader) -> Side:
        """Plans are read again if markers speak of units that the open store does not know yet."""
        markers = store.markers()
        if any(unit not in store.plans for unit in markers[0]):
            store.refresh()
        plans = store.plans
        units = [unit for unit in markers[0] if unit in plans]
        rows = {key: row for unit in units for row, key in zip(plans.rows(unit), plans.keys(unit), strict=True)}
        return cls(store, plans, markers, rows)

    @property
    def units(self) -> list[int]:
        """Committed, rising."""
        return [unit for unit in self.markers[0] if unit in self.plans]

    @property
    def layers(self) -> tuple[int, ...]:
        """Of all sets that were there at the beginning, rising."""
        return tuple(sorted(layer for layers in self.plans.layer_sets[: len(self.markers)] for layer in layers))

    def is_refused(self, key: RowKey) -> bool:
        """With the layers that the store began with."""
        row = self.rows[key]
        return row in self.markers[0][self.plans.unit_of(row)].refused

    def layer_set(self, layer: int) -> int:
        """Number of the set that the layer belongs to."""
        return next(number for number, layers in enumerate(self.plans.layer_sets) if layer in layers)

    def has_numbers(self, key: RowKey, layer_set: int) -> bool:
        """Whether its unit has a marker for the set too, and no marker refuses it."""
        row = self.rows[key]
        found = [self.markers[number].get(self.plans.unit_of(row)) for number in {0, layer_set}]
        return all(marker is not None and row not in marker.refused for marker in found)
