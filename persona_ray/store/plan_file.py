"""`_plans/000000.json`: what a store is for. Written once, first of all; all Zarr metadata follow from it.

It holds the plan in columns, the identity, the job that began the store, the date and the versions, so that a store whose
creation was interrupted is completed to the very same bytes.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import persona_ray
from persona_ray.errors import InputError, IntegrityError
from persona_ray.spec import Identity, Plan, RowKey, digest_of
from persona_ray.store.backend import Backend

PLAN_KEY = "_plans/000000.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFile:
    """The plan file's content."""

    plan: Plan
    identity: dict[str, Any]
    job: dict[str, Any]
    created: str
    """ISO 8601, UTC."""
    versions: dict[str, str]
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def new(cls, *, identity: Identity, plan: Plan, job: Mapping[str, Any]) -> PlanFile:
        """The plan file of a store that begins now, with this process's libraries."""
        return cls(
            plan=plan,
            identity=identity.as_dict(),
            job=dict(job),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={"persona_ray": persona_ray.__version__, "zarr": version("zarr"), "python": platform.python_version()},
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """Captured decoder blocks, in the order of the layer dim."""
        return tuple(self.identity["layers"])

    @property
    def hidden_size(self) -> int:
        """Model width."""
        return int(self.identity["hidden_size"])

    @property
    def identity_digest(self) -> str:
        """SHA-256, equal to `Identity.digest`."""
        return digest_of(self.identity)

    @property
    def plan_digest(self) -> str:
        """SHA-256 over rows, codes and unit borders."""
        return digest_of(_plan_as_dict(self.plan))

    def to_bytes(self) -> bytes:
        """JSON."""
        document = {
            "schema_version": self.schema_version,
            "created": self.created,
            "identity": self.identity,
            "job": self.job,
            "versions": self.versions,
            "plan": _plan_as_dict(self.plan),
        }
        return json.dumps(document, allow_nan=False).encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> PlanFile:
        """The reverse. Raises InputError for a newer schema, IntegrityError for anything unreadable."""
        try:
            document = json.loads(data)
            schema_version = int(document["schema_version"])
            if schema_version > SCHEMA_VERSION:
                raise InputError(
                    f"{where}: has schema {schema_version}, and this persona_ray reads up to {SCHEMA_VERSION}; update persona_ray"
                )
            return cls(
                plan=_plan_of_dict(document["plan"]),
                identity=document["identity"],
                job=document["job"],
                created=document["created"],
                versions=document["versions"],
                schema_version=schema_version,
            )
        except (KeyError, TypeError, IndexError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise IntegrityError(f"{where}: {PLAN_KEY} is damaged ({error!r})") from error


def read_plan_file(backend: Backend) -> PlanFile:
    """The plan file of the store at `backend`. Raises InputError if there is no store."""
    data = backend.get_or_none(PLAN_KEY)
    if data is None:
        raise InputError(f"{backend.url}: no persona_ray store here ({PLAN_KEY} is missing); check the path or URL")
    return PlanFile.from_bytes(data, backend.url)


def _plan_as_dict(plan: Plan) -> dict[str, Any]:
    codes = {name: code for code, name in enumerate(plan.archetypes)}
    return {
        "first_unit": plan.first_unit,
        "unit_rows": plan.unit_rows,
        "archetypes": list(plan.archetypes),
        "default_archetypes": list(plan.default_archetypes),
        "archetype": [codes[key.archetype] for key in plan.keys],
        "system_prompt": [key.system_prompt for key in plan.keys],
        "question": [key.question for key in plan.keys],
        "sample": [key.sample for key in plan.keys],
        "turn": [key.turn for key in plan.keys],
    }


def _plan_of_dict(columns: Mapping[str, Any]) -> Plan:
    names = tuple(columns["archetypes"])
    rows = zip(columns["archetype"], columns["system_prompt"], columns["question"], columns["sample"], columns["turn"], strict=True)
    return Plan(
        archetypes=names,
        default_archetypes=tuple(columns["default_archetypes"]),
        keys=tuple(RowKey(names[code], *rest) for code, *rest in rows),
        unit_rows=columns["unit_rows"],
        first_unit=columns["first_unit"],
    )
