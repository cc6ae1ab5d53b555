"""What a store holds, how far it is, and what its rows cost. From plans, markers and listings alone: no object of a unit is read.

Requests: two for the plans and one for each of them, a listing of each folder of markers and of the scores (one for every 1,000
entries), one GET for each marker, and a handful.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from persona_ray.spec import RunCounts
from persona_ray.store.marker import Marker
from persona_ray.store.plan_file import PlanFile
from persona_ray.store.plans import Plans
from persona_ray.store.snapshot import Snapshot


class Described(Protocol):
    """What is asked of a store."""

    url: str

    @property
    def plans(self) -> Plans:
        """What was asked for."""
        ...

    def markers(self) -> list[dict[int, Marker]]:
        """By set of layers."""
        ...

    def counts(self, rows: Iterable[int] | None = None) -> RunCounts:
        """Rows asked, stored, refused."""
        ...

    def snapshot(self) -> Snapshot:
        """State of the ledger."""
        ...

    def latest_scores(self) -> str | None:
        """Judge in force."""
        ...

    def latest_reduced(self) -> str | None:
        """Result in force."""
        ...

    def scored_units(self, name: str) -> frozenset[int]:
        """Units that a judge has scored."""
        ...


def store_info(store: Described) -> dict[str, Any]:
    """Plain JSON values. Sizes in bytes, times in seconds, dates ISO 8601 in UTC."""
    by_set = store.markers()
    counts, plans = store.counts(), store.plans
    all_markers = [marker for markers in by_set for marker in markers.values()]
    first = plans.first
    return {
        "url": store.url,
        "name": first.job.get("name"),
        "model": {name: plans.identity[f"model_{name}"] for name in ("id", "revision")},
        "dtype": {"model": plans.identity["dtype"], "store": plans.identity["store_dtype"]},
        "layers": list(plans.layers),
        "layer_sets": [
            {"layers": list(layers), "committed": len(markers)} for layers, markers in zip(plans.layer_sets, by_set, strict=False)
        ],
        "hidden_size": plans.hidden_size,
        "archetypes": list(plans.archetypes),
        "default_archetypes": list(plans.default_archetypes),
        "plans": [_plan(file, by_set[0]) for file in plans.files],
        "units": {"planned": plans.num_units, "committed": len(by_set[0]), "rows": plans.unit_rows},
        "rows": {"asked": counts.asked, "stored": counts.stored, "refused": counts.refused, "reasons": counts.reasons},
        "scores": _scores(store, by_set[0]),
        "reduced": {"latest": store.latest_reduced()},
        "bytes": sum(marker.num_bytes for marker in all_markers),
        "cost": cost([*by_set[0].values()]),
        "created": first.created,
        "last_commit": max((marker.created for marker in all_markers), default=None),
        "identity_digest": plans.identity_digest,
        "plan_digest": plans.digest,
        "ledger_digest": store.snapshot().digest,
        "schema_version": max(file.schema_version for file in plans.files),
        "versions": first.versions,
    }


def cost(markers: Sequence[Marker]) -> dict[str, Any]:
    """What 1,000 stored rows took, by hardware. Where there is more than one kind, `mixed_hardware` is true: do not compare seconds.

    `accelerator_seconds` are seconds of a unit times its replica's shards, divided by the units that a replica has under way at
    once; what loading and waiting took is not in them.
    """
    by_hardware: dict[str, list[Marker]] = {}
    for marker in markers:
        by_hardware.setdefault(str(marker.made.get("hardware", "unknown")), []).append(marker)
    return {
        "mixed_hardware": len(by_hardware) > 1,
        "per_1000_rows": {hardware: _per_1000(group) for hardware, group in sorted(by_hardware.items())},
    }


def _per_1000(markers: Sequence[Marker]) -> dict[str, float]:
    rows = sum(marker.num_stored for marker in markers)
    total: dict[str, float] = defaultdict(float)
    for marker in markers:
        total["tokens"] += int(marker.made.get("tokens", 0))
        total["bytes"] += marker.num_bytes
        for phase, seconds in marker.made.get("seconds", {}).items():
            total[f"{phase}_accelerator_seconds"] += accelerator_seconds(marker.made, float(seconds))
    return {"rows": rows, **{name: round(value * 1000 / rows, 3) for name, value in total.items()}} if rows else {"rows": 0}


def accelerator_seconds(made: Mapping[str, Any], seconds: float) -> float:
    """What a unit's wall seconds took of all shards of its replica."""
    return seconds * int(made.get("stages", 1)) * int(made.get("tensor_parallel", 1)) / int(made.get("concurrent_units", 1))


def _plan(file: PlanFile, markers: Mapping[int, Marker]) -> dict[str, Any]:
    return {
        "created": file.created,
        "job": file.job.get("name"),
        "purpose": file.purpose,
        "rows": len(file.plan.keys),
        "units": len(file.plan.units),
        "committed": sum(unit in markers for unit in file.plan.units),
    }


def _scores(store: Described, markers: Mapping[int, Marker]) -> dict[str, Any]:
    latest = store.latest_scores()
    scored = [] if latest is None else [markers[unit] for unit in store.scored_units(latest) if unit in markers]
    return {"latest": latest, "units": len(scored), "rows": sum(marker.num_rows for marker in scored)}
