"""Two identities field by field: what makes another experiment of a job. Values only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class FieldDifference:
    """One field of the two identities."""

    name: str
    """Dotted, if it is in another."""
    a: Any
    b: Any


def differing_fields(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> Iterator[FieldDifference]:
    """Fields whose values differ, by name; nested mappings field by field. One that is not there is None."""
    for name in sorted(a.keys() | b.keys()):
        one, other = a.get(name), b.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from differing_fields(one, other, f"{prefix}{name}.")
        elif one != other:
            yield FieldDifference(f"{prefix}{name}", one, other)
