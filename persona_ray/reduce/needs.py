"""Which archetypes need more rows than they have, and why: too few pass the filter, or their mean is not known well enough."""

from __future__ import annotations

import numpy as np

from persona_ray.config import ExtraConfig
from persona_ray.spec import Reduced


def who_needs_more(reduced: Reduced, config: ExtraConfig) -> dict[str, str]:
    """Archetype -> reason in words, the default Assistant included, at the recommended layer; by rising code."""
    place = reduced.layers.index(reduced.attributes["best_layer"])
    role_AD = reduced.role_vector_ALD[:, place].astype(np.float64)
    distance_A = np.linalg.norm(role_AD - np.nanmean(role_AD, axis=0), axis=-1)  # NaN without a role vector
    length = float(np.linalg.norm(reduced.axis_LD[place].astype(np.float64)))
    defaults, min_count = set(reduced.attributes["default_archetypes"]), reduced.attributes["min_count"]
    needs: dict[str, str | None] = {}
    for code, name in enumerate(reduced.archetypes):
        if name in defaults:
            needs[name] = _too_uncertain(reduced, name, place, length, config, "the length of the axis")
        elif np.isnan(distance_A[code]):
            needs[name] = f"{reduced.role_count_A[code]} rows count, and a role vector takes {min_count}"
        else:
            needs[name] = _too_uncertain(reduced, name, place, float(distance_A[code]), config, "its distance from the mean role")
    return {name: reason for name, reason in needs.items() if reason is not None}


def _too_uncertain(reduced: Reduced, name: str, place: int, length: float, config: ExtraConfig, what: str) -> str | None:
    error = reduced.attributes["vector_error"].get(name, [None] * len(reduced.layers))[place]
    if error is None:
        return "a single row says nothing of its spread"
    share = error / length if length else np.inf
    return f"standard error of its vector is {share:.3g} of {what}" if share > config.max_error else None
