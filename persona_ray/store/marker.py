"""`_commits/{unit}.json`: the record that makes a unit exist. A value; knows no backend."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from persona_ray.errors import IntegrityError
from persona_ray.store.backend import StoredObject

COMMITS_FOLDER = "_commits"
_MARKER_KEY = re.compile(rf"{COMMITS_FOLDER}/(\d{{6,}})\.json")


@dataclass(frozen=True, slots=True)
class ObjectRecord:
    """What an object of a committed unit must be."""

    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, stored: StoredObject) -> ObjectRecord:
        """Without the question of who wrote it."""
        return cls(stored.num_bytes, stored.sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """The marker's content."""

    unit: int
    first_row: int
    num_rows: int
    """Real rows; padding is not counted."""
    objects: Mapping[str, ObjectRecord]
    """By key: the unit's text and numbers, in the order of writing."""
    refused: Mapping[int, str]
    """Row index in the store -> reason."""
    made: Mapping[str, Any]
    """Kernel, hardware, seconds, tokens, notes."""
    created: str
    """ISO 8601, UTC."""

    @property
    def num_stored(self) -> int:
        """Rows with numbers."""
        return self.num_rows - len(self.refused)

    @property
    def num_bytes(self) -> int:
        """Of all objects of the unit."""
        return sum(record.num_bytes for record in self.objects.values())

    def to_bytes(self) -> bytes:
        """JSON."""
        document = {
            "unit": self.unit,
            "first_row": self.first_row,
            "num_rows": self.num_rows,
            "objects": {key: {"num_bytes": record.num_bytes, "sha256": record.sha256} for key, record in self.objects.items()},
            "refused": [{"rollout": row, "reason": reason} for row, reason in sorted(self.refused.items())],
            "made": dict(self.made),
            "created": self.created,
        }
        return json.dumps(document, allow_nan=False).encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Marker:
        """The reverse. Raises IntegrityError naming `where` if the bytes are damaged."""
        try:
            document = json.loads(data)
            return cls(
                unit=document["unit"],
                first_row=document["first_row"],
                num_rows=document["num_rows"],
                objects={key: ObjectRecord(**record) for key, record in document["objects"].items()},
                refused={line["rollout"]: line["reason"] for line in document["refused"]},
                made=document["made"],
                created=document["created"],
            )
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise IntegrityError(f"{where}: damaged commit marker ({error!r})") from error


def marker_key(unit: int) -> str:
    """Where the unit's marker is."""
    return f"{COMMITS_FOLDER}/{unit:06d}.json"


def unit_of_marker_key(key: str) -> int | None:
    """The reverse; None if `key` is no marker's."""
    match = _MARKER_KEY.fullmatch(key)
    return int(match.group(1)) if match else None


def digest_of_markers(markers: Mapping[int, bytes]) -> str:
    """SHA-256 (hex) over unit and SHA-256 of its marker's bytes, by rising unit: names a state of a growing store."""
    digest = hashlib.sha256()
    for unit, data in sorted(markers.items()):
        digest.update(f"{unit} {hashlib.sha256(data).hexdigest()}\n".encode())
    return digest.hexdigest()
