"""The result in force, cut to the layers that are exported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np

from persona_ray.errors import InputError
from persona_ray.spec import Float32, Reduced
from persona_ray.store.reader import StoreReader


def result_in_force(store: StoreReader, layers: Sequence[int] | None = None) -> Reduced | None:
    """With `layers` only, in that order (None: all that it has); None if nothing was reduced yet.

    Raises InputError for a layer that the result does not have.
    """
    name = store.latest_reduced()
    return None if name is None else _cut(store.url, store.reduced(name), layers)


def role_vectors(reduced: Reduced) -> dict[str, Float32]:
    """Archetype -> (L, D), of those that have one: neither the default Assistant nor what the filter left with too few rows."""
    named = zip(reduced.archetypes, reduced.role_vector_ALD, strict=True)
    return {name: vector_LD for name, vector_LD in named if np.isfinite(vector_LD).all()}


def _cut(url: str, reduced: Reduced, layers: Sequence[int] | None) -> Reduced:
    if layers is None or tuple(layers) == reduced.layers:
        return reduced
    missing = [layer for layer in layers if layer not in reduced.layers]
    if missing:
        have = ", ".join(map(str, reduced.layers))
        raise InputError(f"{url}: the result {reduced.name} has no layer {missing[0]}, only {have}; reduce again, or choose other layers")
    at = [reduced.layers.index(layer) for layer in layers]
    by_layer = {field.name: getattr(reduced, field.name) for field in fields(Reduced) if "L" in field.name.rpartition("_")[2]}
    cut = {name: values.take(at, 1 if name.endswith("_ALD") else 0) for name, values in by_layer.items() if values is not None}
    return replace(reduced, layers=tuple(layers), **cut)
