"""The end of a run: what plain zarr and xarray users read instead of markers is brought up to date."""

from __future__ import annotations

import numpy as np

from persona_ray.store.address import open_backend
from persona_ray.store.backend import Backend
from persona_ray.store.encoding import encode_unit
from persona_ray.store.layout import chunk_key, committed_name, unit_arrays
from persona_ray.store.ledger import Ledger
from persona_ray.store.metadata import settle
from persona_ray.store.plans import Plans


def finish_store(url: str) -> None:
    """Add `committed` chunks that a crash left out, and settle the metadata. May be done at any time, by anybody, again."""
    backend = open_backend(url)
    plans = settle(backend)
    for layer_set in range(len(plans.layer_sets)):
        _complete_mask(backend, plans, layer_set, Ledger(url, layer_set).committed())


def _complete_mask(backend: Backend, plans: Plans, layer_set: int, committed: frozenset[int]) -> None:
    spec = unit_arrays(plans)[committed_name(layer_set)]
    present = set(backend.list_keys(spec.name))
    for unit in sorted(committed):
        key = chunk_key(spec, unit)
        # A unit of a plan that came just now is its own run's.
        if key in present or unit not in plans:
            continue
        values_R = np.zeros(plans.unit_rows, dtype=np.int8)
        values_R[: len(plans.rows(unit))] = 1
        backend.create_once(key, encode_unit(spec, values_R))
