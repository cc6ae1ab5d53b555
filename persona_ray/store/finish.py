"""The end of a run: what plain zarr and xarray users read instead of markers is brought up to date."""

from __future__ import annotations

import numpy as np

from persona_ray.store.address import open_backend
from persona_ray.store.encoding import consolidate, encode_unit
from persona_ray.store.layout import unit_arrays, unit_chunk_key, unit_slice
from persona_ray.store.ledger import Ledger
from persona_ray.store.plan_file import read_plan_file


def finish_store(url: str) -> None:
    """Add `committed` chunks that a crash left out, and consolidate the metadata. May be done at any time, by anybody, again."""
    backend = open_backend(url)
    header = read_plan_file(backend)
    spec = unit_arrays(header)["committed"]
    present = set(backend.list_keys(spec.name))
    for unit in sorted(Ledger(url).committed()):
        key = unit_chunk_key(spec, unit)
        if key in present:
            continue
        rows = unit_slice(header.plan, unit)
        values_R = np.zeros(header.plan.unit_rows, dtype=np.int8)
        values_R[: rows.stop - rows.start] = 1
        backend.create_once(key, encode_unit(spec, values_R))
    consolidate(backend)
