"""`_layers/{k}.json`: further decoder blocks of rows that are there already. Write-once, claimed by number, as plans are.

The layers that a store began with are set 0, named by its identity; set k >= 1 has an array `activations_{k}` of its own,
with its own markers. Text, columns and scores are those of set 0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from persona_ray.errors import IntegrityError

LAYERS_FOLDER = "_layers"
_KEY = re.compile(rf"{LAYERS_FOLDER}/(\d{{6,}})\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayersFile:
    """The file's content."""

    layers: tuple[int, ...]
    """Rising; none of them in an earlier set."""
    job: dict[str, Any]
    created: str
    """ISO 8601, UTC."""

    @classmethod
    def new(cls, layers: Sequence[int], job: Mapping[str, Any]) -> LayersFile:
        """Asked for now."""
        return cls(layers=tuple(sorted(layers)), job=dict(job), created=datetime.now(UTC).isoformat(timespec="seconds"))

    def to_bytes(self) -> bytes:
        """JSON."""
        return json.dumps({"layers": list(self.layers), "job": self.job, "created": self.created}, allow_nan=False).encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> LayersFile:
        """The reverse. Raises IntegrityError for anything unreadable."""
        try:
            document = json.loads(data)
            return cls(layers=tuple(int(layer) for layer in document["layers"]), job=document["job"], created=document["created"])
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"{where}: damaged list of layers ({error!r})") from error


def layers_key(number: int) -> str:
    """Where set `number` is declared; there is no file of set 0."""
    return f"{LAYERS_FOLDER}/{number:06d}.json"


def number_of_layers_key(key: str) -> int | None:
    """The reverse; None if `key` is none of these."""
    match = _KEY.fullmatch(key)
    return int(match.group(1)) if match else None
