"""What encoding costs, and what it saves."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from statistics import median
from tempfile import TemporaryDirectory
from unittest.mock import patch

from persona_ray.bench_store.hands import share_out
from persona_ray.bench_store.turns import Took, timed
from persona_ray.bench_store.work import Work, write
from persona_ray.errors import InputError
from persona_ray.store.address import open_backend
from persona_ray.store.backend import Backend, StoredObject
from persona_ray.store.reader import open_store
from persona_ray.store.writer import UnitWriter


def encoding_cpu_s_per_gb(work: Work) -> float:
    """CPU seconds of everything but the requests: Parquet, rounding, encoding, check sums, digests. One thread; objects stay in memory."""
    kept: dict[str, bytes] = {}

    def create(_: Backend, key: str, data: bytes) -> StoredObject:
        kept[key] = data
        return StoredObject.of(data, data)

    with TemporaryDirectory(prefix="persona-ray-bench-") as folder:
        work.prepare(folder)
        writer, kind = UnitWriter(folder), type(open_backend(folder))
        read = kind.get_or_none
        took: list[Took] = []
        with (
            patch.object(kind, "create_once", create),
            patch.object(kind, "get_or_none", lambda self, key: kept.get(key) or read(self, key)),
        ):
            for batch in range(work.settings.pairs + 1):
                units = work.batch(batch)
                kept.clear()
                turn = timed(0, partial(share_out, units, [writer], write))
                took.append(replace(turn, num_bytes=sum(map(len, kept.values()))))
    return median(turn.cpu_s_per_gb for turn in took[1:])


def encoded_share(url: str) -> float:
    """Bytes of all stored activations over their bytes in bfloat16."""
    store = open_store(url)
    backend = open_backend(url)
    num_rows = sum(len(rows.rollout_R) for rows in store.scored_rows(sorted(store.ledger.committed()), None))
    if not num_rows:
        raise InputError(f"{url}: holds no activations yet")
    num_bytes = sum(item.num_bytes for item in backend.list_objects("activations/c"))
    return num_bytes / (2 * num_rows * len(store.layers) * store.hidden_size)
