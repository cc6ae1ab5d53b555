"""One place: a store beside the bare client's objects, both written and read there."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from persona_ray.bench_store.hands import share_out
from persona_ray.bench_store.requests import Requests
from persona_ray.bench_store.turns import Took, compared, in_turns, timed
from persona_ray.bench_store.work import Work, write
from persona_ray.errors import IntegrityError
from persona_ray.store.address import absolute_url, open_backend
from persona_ray.store.backend import Backend
from persona_ray.store.reader import open_store
from persona_ray.store.writer import UnitWriter


class Bench:
    """One place: a store, and beside it the bare client's objects."""

    def __init__(self, root: str, work: Work) -> None:
        self.work, self.settings = work, work.settings
        self.store_url, self._bare_url = f"{root}/store", f"{root}/bare"
        self._backend = open_backend(self.store_url)
        self._writers = [UnitWriter(self.store_url) for _ in range(self.settings.threads)]
        self._objects: dict[str, bytes] = {}

    def begin(self) -> dict[str, Any]:
        """Create the store and write the first batch; what the bare client will put are its objects."""
        self.work.prepare(self.store_url)
        before = set(self._backend.list_keys(""))
        for writer in self._writers:
            # Each looks at the plan once, which is no unit's request.
            writer.read_rollouts(0)
        requests = Requests()
        with requests.heard(type(self._backend)):
            share_out(self.work.batch(0), self._writers, write)
        self._objects = {key: self._backend.get(key) for key in self._backend.list_keys("") if key not in before}
        return {
            "objects_per_unit": len(self._objects) / self.settings.units,
            "bytes_per_unit": self._num_bytes / self.settings.units,
            "requests_per_unit": requests.per_unit(self.settings.units),
        }

    def writing(self) -> dict[str, Any]:
        """UnitWriters beside bare puts of the same objects."""
        bare = [open_backend(self._bare_url) for _ in self._writers]
        share_out([("first", data) for data in self._objects.values()], bare[:1], lambda backend, job: put(backend, *job))

        def ours(turn: int) -> Took:
            units = self.work.batch(turn + 1)
            return timed(self._num_bytes, lambda: share_out(units, self._writers, write))

        def theirs(turn: int) -> Took:
            objects = [(f"{turn}/{key}", data) for key, data in self._objects.items()]
            return timed(self._num_bytes, lambda: share_out(objects, bare, lambda backend, job: put(backend, *job)))

        took = in_turns(self.settings.pairs, {"ours": ours, "bare": theirs})
        return compared(took["ours"], took["bare"])

    def reading(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """One pass over a batch, and one layer of everything, beside bare gets of what the pass asks for, as many at once."""
        units = self.work.indices(0)
        reader, requests = open_store(self.store_url), Requests()
        with requests.heard(type(self._backend)):
            num_rows = sum(len(rows.rollout_R) for rows in reader.scored_rows(units, None))
        if num_rows != len(units) * self.settings.unit_rows:
            raise IntegrityError(f"{self.store_url}: read {num_rows} rows of {len(units)} units")
        num_bytes = sum(len(self._objects[key]) for key in requests.keys)
        layer_bytes = sum(self._activation_sizes()) / self.settings.layers
        bare = [open_backend(self.store_url) for _ in range(requests.most_at_once)]
        share_out(requests.keys, bare, lambda backend, key: backend.get(key))

        def one_pass(_: int) -> Took:
            store = open_store(self.store_url)
            return timed(num_bytes, lambda: sum(1 for _ in store.scored_rows(units, None)))

        def gets(_: int) -> Took:
            return timed(num_bytes, lambda: share_out(requests.keys, bare, lambda backend, key: backend.get(key)))

        def one_layer(turn: int) -> Took:
            store = open_store(self.store_url)
            return timed(layer_bytes, lambda: store.layer(turn % self.settings.layers))

        took = in_turns(self.settings.pairs, {"pass": one_pass, "bare": gets, "layer": one_layer})
        at_once = {
            "gets_at_once": requests.most_at_once,
            "requests_per_unit": requests.per_unit(len(units)),
        }
        return compared(took["pass"], took["bare"]) | at_once, compared(took["layer"], took["bare"])

    @property
    def _num_bytes(self) -> int:
        return sum(map(len, self._objects.values()))

    def _activation_sizes(self) -> list[int]:
        return [item.num_bytes for item in self._backend.list_objects("activations/c")]


def put(backend: Backend, key: str, data: bytes) -> None:
    """The client's plain put: no condition, no digest, and durable as ever."""
    backend._replace(key, data)  # the store itself has no use for it


@contextmanager
def scratch(url: str) -> Iterator[str]:
    """A place of its own below `url`, gone afterwards."""
    root = f"{absolute_url(url)}/benchmark-{uuid.uuid4().hex[:12]}"
    try:
        yield root
    finally:
        backend = open_backend(root)
        with ThreadPoolExecutor(16) as threads:
            list(threads.map(backend.delete, backend.list_keys("")))
        if "://" not in root:
            shutil.rmtree(root, ignore_errors=True)
