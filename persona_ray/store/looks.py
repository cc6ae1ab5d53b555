"""What a run saw of its axis while it went on: `_looks/{rows}.json`, one for each look, written once. For whoever watches the run.

Nothing follows from them: a run that goes on looks for itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from persona_ray.errors import IntegrityError
from persona_ray.store.address import open_backend
from persona_ray.store.backend import Backend

LOOKS_FOLDER = "_looks"


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisLook:
    """The axis of the longest complete prefix of the work order, as it was then."""

    rows_per_archetype: int
    layers: tuple[int, ...]
    expected_cosine: tuple[float, ...]
    """By layer, with the axis of endlessly many rows."""
    created: str
    """ISO 8601, UTC."""


def write_look(url: str, rows_per_archetype: int, layers: Sequence[int], expected_cosine: Sequence[float]) -> None:
    """Keep it; one of as many rows that is there already is left as it is."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    look = AxisLook(
        rows_per_archetype=rows_per_archetype,
        layers=tuple(layers),
        expected_cosine=tuple(float(f"{cosine:.6g}") for cosine in expected_cosine),
        created=now,
    )
    open_backend(url).create_once(f"{LOOKS_FOLDER}/{rows_per_archetype:08d}.json", json.dumps(asdict(look)).encode())


def latest_look(backend: Backend) -> AxisLook | None:
    """The one of most rows; None if nobody has looked. Raises IntegrityError if it is damaged."""
    keys = sorted(backend.list_keys(LOOKS_FOLDER))
    if not keys:
        return None
    try:
        found: dict[str, Any] = json.loads(backend.get(keys[-1]))
        return AxisLook(
            rows_per_archetype=int(found["rows_per_archetype"]),
            layers=tuple(found["layers"]),
            expected_cosine=tuple(found["expected_cosine"]),
            created=str(found["created"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"{backend.url}: {keys[-1]} is damaged ({error!r}); delete {LOOKS_FOLDER}/, nothing follows from it"
        ) from error
