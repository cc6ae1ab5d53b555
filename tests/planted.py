"""Stores whose answers are known: every archetype has a planted place, and the result in force is computed from the rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from persona_ray.config import ReduceConfig
from persona_ray.reduce.merging import in_process
from persona_ray.reduce.moments import Moments
from persona_ray.reduce.persona_space import Block, persona_space
from persona_ray.spec import Float32, Float64, Identity, Reduced
from persona_ray.store.reader import open_store
from persona_ray.store.reduced import publish_reduced, write_reduced
from tests.store.conftest import Toy

PLACES: Mapping[str, tuple[float, float]] = {
    "sage": (1.0, 0.25),
    "bard": (0.5, -0.5),
    "imp": (0.0, 0.5),
    "crone": (-0.5, -0.5),
    "ghost": (-1.0, 0.25),
}
"""Role -> coordinates; their mean is 0, so the axis is where the default Assistant lies."""
DEFAULT = (2.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Planted(Toy):
    """Row = place of its archetype in a plane, times the layer's gain (layer + 1), plus an offset in dim 4; rows differ in dim 5."""

    rows: int = 24
    store_dtype: str = "float32"
    model: str = "toy/model"
    places: Mapping[str, tuple[float, float]] = field(default_factory=lambda: PLACES)
    archetypes: tuple[str, ...] = ("default", *PLACES)
    turned_degrees: float = 0.0
    """The first direction of the plane, turned toward dim 3."""

    def identity(self, **changes: Any) -> Identity:
        return super().identity(**({"model_id": self.model} | changes))

    @property
    def plane_2D(self) -> Float64:
        angle = np.radians(self.turned_degrees)
        plane_2D = np.zeros((2, self.hidden))
        plane_2D[0, [0, 3]] = np.cos(angle), np.sin(angle)
        plane_2D[1, 1] = 1
        return plane_2D

    def activations(self, unit: int, seed: int = 0) -> Float32:
        rollouts = self.rollouts(unit)
        place_R2 = np.array([dict(self.places, default=DEFAULT)[rollout.key.archetype] for rollout in rollouts])
        gain_L = np.array(self.layers) + 1.0
        values_RLD = (place_R2 @ self.plane_2D)[:, None] * gain_L[:, None]
        values_RLD[..., 4] += 10
        # Rows of an archetype differ, and their mean does not: two rows each of +0.5 and -0.5.
        values_RLD[..., 5] += np.array([0.5 - rollout.key.question % 2 for rollout in rollouts])[:, None]
        return values_RLD.astype(np.float32)

    def reduced(self, url: str | Path, **settings: Any) -> str:
        """Fill the store, compute its result and put it in force; answers its URL."""
        reduce_again(self.fill(url), **settings)
        return str(url)


def reduce_again(url: str, **settings: Any) -> Reduced:
    """The result of what the store holds, put in force."""
    store = open_store(url)
    moments = in_process(lambda units: store.scored_rows(units, None), sorted(store.ledger.committed()), Moments.of)
    found = persona_space(
        [Block(store.layers, moments)],
        archetypes=store.archetypes,
        default_archetypes=store.default_archetypes,
        config=ReduceConfig(**({"min_count": 2, "bootstrap": 0} | settings)),
        judge_name=None,
        ledger_digest=store.snapshot().digest,
    )
    write_reduced(url, found)
    publish_reduced(url, found.name)
    return found
