"""How far a store is and how fast it grows, by its markers alone: no object of a unit is read, and no cluster is asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from itertools import chain
from typing import Any

from persona_ray.config import parse_job
from persona_ray.errors import InputError
from persona_ray.shards.prices import devices_of, price_of
from persona_ray.store.info import accelerator_seconds
from persona_ray.store.marker import Marker
from persona_ray.store.reader import StoreReader

WINDOW_S = 600.0
"""Rates are those of the units committed in so many seconds before the last commit."""


def store_progress(store: StoreReader, now_s: float) -> dict[str, Any]:
    """Plain JSON values. `now_s`: seconds since 1970. Markers that were read before are not read again.

    `rates` is None until two units were committed one after the other, `seconds_left` where nothing was committed lately;
    `peak_device_bytes`, of the shard that took most memory of its GPU, where nothing was computed on one; `axis_so_far` where no
    run of the store has looked at its axis (`reduce.stop`).
    """
    by_set = store.markers()
    if any(unit not in store.plans for unit in by_set[0]):
        store.refresh()  # another run has added a plan
    plans = store.plans
    markers = list(by_set[0].values())
    every = list(chain.from_iterable(found.values() for found in by_set))
    rows = _rows(sum(len(file.plan.keys) for file in plans.files), markers)
    last = max((_seconds(marker) for marker in every), default=None)
    is_moving = last is not None and now_s - last < WINDOW_S
    rates = _rates(every)
    left = rows["asked"] - rows["stored"] - rows["refused"]
    look = store.latest_look()
    return {
        "url": store.url,
        "name": plans.first.job.get("name"),
        "model": plans.identity["model_id"],
        "rows": rows,
        "units": {"planned": plans.num_units, "committed": len(markers)},
        "more_layers": [
            {"layers": list(layers), "committed": len(found)} for layers, found in zip(plans.layer_sets[1:], by_set[1:], strict=False)
        ],
        "rates": rates,
        "hardware": dict(Counter(str(marker.made.get("hardware", "unknown")) for marker in every).most_common()),
        "peak_device_bytes": max(
            (marker.made["peak_device_bytes"] for marker in every if "peak_device_bytes" in marker.made), default=None
        ),
        "last_commit": max((marker.created for marker in every), default=None),
        "seconds_left": round(left / rates["rows_per_s"]) if rates and is_moving else None,
        "money": _money(plans.files[-1].job, every, left),
        "axis": store.latest_reduced(),
        "axis_so_far": None if look is None else asdict(look),
        "is_complete": all(len(found) >= plans.num_units for found in by_set),
    }


def _rows(asked: int, markers: Sequence[Marker]) -> dict[str, Any]:
    reasons = Counter(chain.from_iterable(marker.refused.values() for marker in markers))
    stored = sum(marker.num_stored for marker in markers)
    return {"asked": asked, "stored": stored, "refused": reasons.total(), "reasons": dict(reasons.most_common())}


def _rates(markers: Sequence[Marker]) -> dict[str, float] | None:
    """What was committed between the first and the last commit of the window, by second.

    `busy_replicas`: seconds of these units by second, divided by the units that a replica has under way at once.
    """
    last = max(map(_seconds, markers), default=0.0)
    window = [marker for marker in markers if last - _seconds(marker) <= WINDOW_S]
    first = min(map(_seconds, window), default=0.0)
    new = [marker for marker in window if _seconds(marker) > first]  # the work of the first ones lies before the span
    if not new:
        return None
    span = last - first
    return {
        "rows_per_s": round(sum(marker.num_rows for marker in new) / span, 3),
        "tokens_per_s": round(sum(int(marker.made.get("tokens", 0)) for marker in new) / span, 1),
        "busy_replicas": round(sum(_busy_s(marker.made) for marker in new) / span, 2),
        "over_s": span,
    }


def _money(job: Mapping[str, Any], markers: Sequence[Marker], rows_left: int) -> dict[str, Any] | None:
    """What the units have cost by their own account, and what the rows that are left will at that rate; None: no price is known.

    Loading and waiting are in nobody's account. `job`: that of the store's last plan.
    """
    try:
        asked = parse_job(job)
    except InputError:  # recorded by another tool or release
        return None
    price = price_of(asked)
    if price is None or not markers:
        return None
    seconds = sum(accelerator_seconds(marker.made, sum(marker.made.get("seconds", {}).values())) for marker in markers)
    spent = seconds / 3600 * devices_of(asked.shards.gpus_per_shard, 1) * price.per_gpu_hour
    left = spent / sum(marker.num_rows for marker in markers) * rows_left
    return {"spent": round(spent, 4), "left": round(left, 4), "per_gpu_hour": price.per_gpu_hour, "source": price.source}


def _busy_s(made: Mapping[str, Any]) -> float:
    return float(sum(made.get("seconds", {}).values())) / int(made.get("concurrent_units", 1))


def _seconds(marker: Marker) -> float:
    return datetime.fromisoformat(marker.created).timestamp()
