"""`_commits/{unit}.json`: the record that makes a unit exist. A value; knows no backend."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from persona_ray.errors import IntegrityError
from persona_ray.store.backend import StoredObject

_MARKER_KEY = re.compile(r"_commits(?:_(\d+))?/(\d{6,})\.json")


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


def marker_key(unit: int, layer_set: int = 0) -> str:
    """Where the unit's marker for a set of layers is. The unit exists when it has that of set 0."""
    return f"{commits_folder(layer_set)}/{unit:06d}.json"


def place_of_marker_key(key: str) -> tuple[int, int] | None:
    """The reverse: set of layers and unit; None if `key` is no marker's."""
    match = _MARKER_KEY.fullmatch(key)
    return (int(match.group(1) or 0), int(match.group(2))) if match else None


def is_in_commits(key: str) -> bool:
    """Whether `key` is in one of the folders where markers are."""
    return re.match(r"_commits(_\d+)?/", key) is not None


def commits_folder(layer_set: int) -> str:
    """Where the markers of a set of layers are."""
    return f"_commits_{layer_set}" if layer_set else "_commits"


def digest_of_lines(lines: Iterable[str]) -> str:
    """SHA-256 (hex) over unit and SHA-256 of its marker's bytes, a line each, by rising unit: names a state of a growing store."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()
