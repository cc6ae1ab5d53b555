"""A report's data, read from a store. Needs neither torch nor a cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from persona_ray.errors import InputError
from persona_ray.reduce.space_pair import SpacePair
from persona_ray.report.data import ReportData
from persona_ray.store.certainty import read_certainty
from persona_ray.store.marker import Marker
from persona_ray.store.reader import StoreReader
from persona_ray.store.steering import read_steering


def report_data(store: StoreReader, comparisons: tuple[SpacePair, ...] = ()) -> ReportData:
    """The result in force with all that belongs to it. Raises InputError if nothing was reduced yet."""
    name = store.latest_reduced()
    if name is None:
        raise InputError(f"{store.url}: no axis was computed yet; finish the run that fills this store first")
    return ReportData(
        reduced=store.reduced(name),
        steering=read_steering(store.url, name),
        run=run_facts(store),
        certainty=read_certainty(store.url, name),
        comparisons=comparisons,
    )


def run_facts(store: StoreReader) -> dict[str, Any]:
    """What was run, by the store's own account: `ReportData.run`."""
    info = store.info()
    markers = store.ledger.markers()
    return {
        "title": info["name"],
        "model_id": info["model"]["id"],
        "model_revision": info["model"]["revision"],
        "dtype": f"{info['dtype']['model']} forward, {info['dtype']['store']} store",
        "attention": store.identity["attention"],
        "rows": info["rows"],
        "units": f"{info['units']['committed']} of {info['units']['planned']}, {info['units']['rows']} rows each",
        "tokens": f"{sum(int(marker.made.get('tokens', 0)) for marker in markers.values()):,}",
        "seconds": _seconds(markers),
        "hardware": ", ".join(sorted({str(marker.made.get("hardware", "unknown")) for marker in markers.values()})),
        "stages": ", ".join(sorted({str(marker.made.get("stages", "unknown")) for marker in markers.values()})),
        "identity_digest": info["identity_digest"],
        "ledger_digest": info["ledger_digest"],
        "store_url": info["url"],
        "versions": info["versions"] | {name: v for marker in markers.values() for name, v in marker.made.get("versions", {}).items()},
        "date": info["last_commit"],
    }


def _seconds(markers: Mapping[int, Marker]) -> dict[str, float]:
    """Worker seconds by phase, summed over units; units overlap, so this is work and not wall time."""
    total: Counter[str] = Counter()
    for marker in markers.values():
        total.update(marker.made.get("seconds", {}))
    return {f"{phase} (summed over units)": round(seconds, 1) for phase, seconds in total.items()}
