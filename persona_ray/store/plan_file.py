"""`_plans/{n}.json`: what a store is for. Each written once, before anything that follows from it.

It holds a plan in columns, the identity, the job that asked, the date and the versions, so that whatever was interrupted is
completed to the very same bytes. Plan 0 begins the store; a run that asks for more adds the next.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import persona_ray
from persona_ray.errors import InputError, IntegrityError
from persona_ray.spec import Identity, Plan, RowKey

PLANS_FOLDER = "_plans"
SCHEMA_VERSION = 1
PLANNED_CHUNK_ROWS = 8_192
"""Columns known at planning are read whole by everybody: few objects. A further plan begins on a border of their chunks."""
FIRST_CHUNK_ROWS = 65_536
"""Of the first stores, which did not record it."""
_PLAN_KEY = re.compile(rf"{PLANS_FOLDER}/(\d{{6,}})\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFile:
    """The plan file's content."""

    plan: Plan
    identity: dict[str, Any]
    job: dict[str, Any]
    created: str
    """ISO 8601, UTC."""
    versions: dict[str, str]
    chunk_units: int
    """Units in a chunk of the planned columns; the same in all plans of a store."""
    purpose: str | None = None
    """Why these rows are wanted, in words, where it is not that a job lists them; they are no part of any balanced order then."""
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def new(
        cls, *, identity: Identity, plan: Plan, job: Mapping[str, Any], chunk_units: int | None = None, purpose: str | None = None
    ) -> PlanFile:
        """A plan that is made now, with this process's libraries. `chunk_units` is the store's; None = it begins with this plan."""
        return cls(
            plan=plan,
            identity=identity.as_dict(),
            job=dict(job),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={"persona_ray": persona_ray.__version__, "zarr": version("zarr"), "python": platform.python_version()},
            chunk_units=_chunk_units(plan) if chunk_units is None else chunk_units,
            purpose=purpose,
        )

    def to_bytes(self) -> bytes:
        """JSON."""
        document = {
            "schema_version": self.schema_version,
            "created": self.created,
            "identity": self.identity,
            "job": self.job,
            "versions": self.versions,
            "chunk_units": self.chunk_units,
            "plan": plan_as_dict(self.plan),
            **({} if self.purpose is None else {"purpose": self.purpose}),
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
            plan = _plan_of_dict(document["plan"])
            return cls(
                plan=plan,
                identity=document["identity"],
                job=document["job"],
                created=document["created"],
                versions=document["versions"],
                chunk_units=document.get("chunk_units") or _chunk_units(plan, FIRST_CHUNK_ROWS),
                purpose=document.get("purpose"),
                schema_version=schema_version,
            )
        except (KeyError, TypeError, IndexError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise IntegrityError(f"{where}: damaged plan ({error!r})") from error


def plan_key(number: int) -> str:
    """Where plan `number` is."""
    return f"{PLANS_FOLDER}/{number:06d}.json"


def number_of_plan_key(key: str) -> int | None:
    """The reverse; None if `key` is no plan's."""
    match = _PLAN_KEY.fullmatch(key)
    return int(match.group(1)) if match else None


def _chunk_units(plan: Plan, chunk_rows: int = PLANNED_CHUNK_ROWS) -> int:
    """About equal chunks of whole units, so that a further plan on a chunk border wastes little behind this one."""
    num_chunks = max(1, -(-plan.num_units * plan.unit_rows // max(chunk_rows, plan.unit_rows)))
    return -(-plan.num_units // num_chunks)


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    """Plain JSON values, in columns."""
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
        "text_digest": list(plan.text_digests),
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
        text_digests=tuple(columns.get("text_digest", ())),
    )
