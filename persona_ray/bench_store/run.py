"""The benchmark of a store, from its settings to the document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from tempfile import TemporaryDirectory
from typing import Any

from persona_ray.bench_store.encoded import encoded_share, encoding_cpu_s_per_gb
from persona_ray.bench_store.memory import READING, WRITING, peaks_above_start
from persona_ray.bench_store.place import Bench, scratch
from persona_ray.bench_store.server import moto
from persona_ray.bench_store.settings import Settings
from persona_ray.bench_store.work import Work

Tell = Callable[[str], object]
"""Is told a line before every long piece of work."""


def benchmark(settings: Settings, urls: Sequence[str], *, with_moto: bool, store: str | None, tell: Tell) -> dict[str, Any]:
    """Everything that was measured, as plain JSON values.

    `urls`: places below which to write (none, and no moto: a temporary folder); `store`: one with real activations, whose encoded
    share is told. Raises InputError for a place or a store that cannot be used.
    """
    work = Work(settings)
    tell("encoding alone")
    document: dict[str, Any] = {
        "settings": asdict(settings) | {"unit_rows": settings.unit_rows},
        "encoding_cpu_s_per_gb": encoding_cpu_s_per_gb(work),
        "places": [],
    }
    with ExitStack() as stack:
        if not urls and not with_moto:
            urls = [stack.enter_context(TemporaryDirectory(prefix="persona-ray-bench-"))]
        document["places"] = [_measured(url, url, work, document, tell) for url in urls]
    if with_moto:
        with moto() as url:
            document["places"].append(_measured("moto", url, work, document, tell))
    if store is not None:
        document["encoded"] = {"share": encoded_share(store), "of": store}
    return document


def _measured(name: str, url: str, work: Work, document: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """One place. The first one's store tells the encoded share of made-up activations, too."""
    with scratch(url) as root:
        bench = Bench(root, work)
        tell(f"{name}: writing")
        units = bench.begin()
        writing = units | bench.writing()
        tell(f"{name}: reading")
        reading, layer = bench.reading()
        document.setdefault("encoded", {"share": encoded_share(bench.store_url), "of": "made-up activations"})
        tell(f"{name}: memory")
        return {
            "place": name,
            WRITING: writing,
            READING: reading,
            "layer": layer,
            "peak_mb_above_start": peaks_above_start(bench.store_url, work.settings),
        }
