"""The benchmark of a store, from its settings to the document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from tempfile import TemporaryDirectory
from typing import Any

from persona_ray.bench_store.encoded import encoded_share, encoding_cpu_s_per_gb
from persona_ray.bench_store.link import link
from persona_ray.bench_store.memory import READING, WRITING, peaks_above_start
from persona_ray.bench_store.place import Bench, scratch
from persona_ray.bench_store.server import moto
from persona_ray.bench_store.settings import Settings
from persona_ray.bench_store.work import Work
from persona_ray.store.address import open_backend

Tell = Callable[[str], object]
"""Is told a line before every long piece of work."""


def benchmark(
    settings: Settings, urls: Sequence[str], *, with_moto: bool, link_mb_per_s: float | None, store: str | None, tell: Tell
) -> dict[str, Any]:
    """Everything that was measured, as plain JSON values.

    `urls`: places below which to write (none, and no moto: a temporary folder); `link_mb_per_s`: each as if it were behind such a
    link, too; `store`: one with real activations, whose encoded share is told. Raises InputError for a place or a store that cannot
    be used.
    """
    work = Work(settings)
    tell("encoding alone")
    document: dict[str, Any] = {
        "settings": asdict(settings) | {"unit_rows": settings.unit_rows},
        "encoding_cpu_s_per_gb": encoding_cpu_s_per_gb(work),
        "places": [],
    }

    def measure(name: str, url: str) -> None:
        for rate in (None,) if link_mb_per_s is None else (None, link_mb_per_s):
            document["places"].append(_measured(name, url, rate, work, document, tell))

    with ExitStack() as stack:
        if not urls and not with_moto:
            urls = [stack.enter_context(TemporaryDirectory(prefix="persona-ray-bench-"))]
        for url in urls:
            measure(url, url)
    if with_moto:
        with moto() as url:
            measure("moto", url)
    if store is not None:
        document["encoded"] = {"share": encoded_share(store), "of": store}
    return document


def _measured(name: str, url: str, link_mb_per_s: float | None, work: Work, document: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """One place. The first one's store tells the encoded share of made-up activations, too."""
    limit = nullcontext() if link_mb_per_s is None else link(type(open_backend(url)), link_mb_per_s)
    name = name if link_mb_per_s is None else f"{name}, {link_mb_per_s:g} MB/s"
    with scratch(url) as root, limit:
        bench = Bench(root, work)
        tell(f"{name}: writing")
        units = bench.begin()
        writing = units | bench.writing()
        tell(f"{name}: reading")
        reading, layer = bench.reading()
        document.setdefault("encoded", {"share": encoded_share(bench.store_url), "of": "made-up activations"})
        if not link_mb_per_s:
            tell(f"{name}: memory")
        return {
            "place": name,
            "link_mb_per_s": link_mb_per_s,
            WRITING: writing,
            READING: reading,
            "layer": layer,
            "peak_mb_above_start": None if link_mb_per_s else peaks_above_start(bench.store_url, work.settings),
        }
