"""The document for people: plain lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from persona_ray.bench_store.memory import READING, WRITING


def lines(document: Mapping[str, Any]) -> Iterator[str]:
    """The document for people."""
    s, encoded = document["settings"], document["encoded"]
    unit = f"{s['unit_rows']} rows x {s['layers']} layers x {s['hidden']}"
    yield f"{s['units']} units of {unit}, {s['threads']} in flight, {s['pairs']} pairs"
    yield f"bf16-exact bytes / bfloat16 bytes  {encoded['share']:.3f}  ({encoded['of']})"
    yield f"encoding alone                     {document['encoding_cpu_s_per_gb']:.2f} CPU-s / GB"
    for place in document["places"]:
        writing, reading, peaks = place[WRITING], place[READING], place["peak_mb_above_start"]
        yield ""
        heads = ("/ bare", "pairs", "MB/s", "bare", "CPU-s/GB", "bare")
        yield f"{place['place']:<35}" + "".join(f"{head:>{width}}" for head, width in zip(heads, (8, 14, 9, 9, 10, 8), strict=True))
        for label, part in (("writing", writing), ("reading, one pass", reading), ("reading, one layer (useful bytes)", place["layer"])):
            yield f"{label:<35}" + _numbers(part)
        yield f"{'a unit':<35}{writing['bytes_per_unit'] / 1e6:.2f} MB in {writing['objects_per_unit']:g} objects"
        yield f"{'requests a unit, writing':<35}{_counts(writing['requests_per_unit'])}"
        yield f"{'requests a unit, reading':<35}{_counts(reading['requests_per_unit'])}, {reading['gets_at_once']} at once"
        if peaks is not None:
            shown = ", ".join(f"{what} {peaks[what]:.0f} MB" for what in (WRITING, READING))
            yield f"{'memory above the start':<35}{shown}; a unit in float32 is {peaks['unit_float32_mb']:.0f} MB"


def _numbers(part: Mapping[str, Any]) -> str:
    spread = f"{min(part['pairs']):.2f}..{max(part['pairs']):.2f}"
    rates = f"{part['mb_per_s']:>9,.0f}{part['bare_mb_per_s']:>9,.0f}{part['cpu_s_per_gb']:>10.2f}{part['bare_cpu_s_per_gb']:>8.2f}"
    return f"{part['over_bare']:>8.2f}{spread:>14}{rates}"


def _counts(counts: Mapping[str, float]) -> str:
    return ", ".join(f"{count:g} {name}" for name, count in counts.items())
