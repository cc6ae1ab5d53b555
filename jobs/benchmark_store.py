"""How fast a store is written and read, beside the same client that puts and gets the same bytes, as ratios of one run.

python jobs/benchmark_store.py                                            in a temporary folder
python jobs/benchmark_store.py --moto --url s3://team/scratch --json store.json

Store and bare client take turns, every second one the other way round, with as many requests at once; a ratio is the median over
the pairs. The bare client puts the objects of such units without a condition and without a digest, and gets what the reader asks for.
Everything is written below a folder of its own, and removed in the end. MB are 10^6 encoded bytes, as they lie in the store.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np

from persona_ray.errors import InputError, IntegrityError, PersonaRayError
from persona_ray.spec import CapturedUnit, FinishReason, Float32, Identity, Plan, Rollout, RowKey
from persona_ray.store.address import absolute_url, open_backend
from persona_ray.store.backend import Backend, StoredObject
from persona_ray.store.prepare import prepare_store
from persona_ray.store.reader import open_store
from persona_ray.store.writer import UnitWriter

T = TypeVar("T")
H = TypeVar("H")

ARCHETYPES = ("default", "bard")
ENCODED_SHARE = 0.87
"""Encoded bytes of a row as a share of its bytes in bfloat16, about: turns megabytes of a unit into its rows."""
TEXT_TOKENS, ANSWER_TOKENS = 80, 320
"""Tokens before an ordinary answer, and in it."""
VOCABULARY = 50_000
NUM_MASSIVE = 4
"""Dims of the residual stream that are hundreds of times as large as all others."""
REQUESTS = ("create_once", "get_or_none", "list_keys", "list_folders", "list_objects", "delete", "_replace")
WRITING, READING = "writing", "reading"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is measured."""

    unit_mb: float = 8.0
    units: int = 8
    threads: int = 4
    pairs: int = 7
    layers: int = 36
    hidden: int = 2560

    @property
    def unit_rows(self) -> int:
        """Rows that encode to about `unit_mb`."""
        return max(1, round(self.unit_mb * 1e6 / (ENCODED_SHARE * 2 * self.layers * self.hidden)))

    @property
    def unit_float32_bytes(self) -> int:
        """Of a unit's activations in memory."""
        return 4 * self.unit_rows * self.layers * self.hidden

    @property
    def batches(self) -> int:
        """Of `units` each: one to begin with, one a pair, one that a process of its own writes."""
        return self.pairs + 2


HELP = {
    "unit_mb": "encoded megabytes of a unit, about",
    "units": "units written or read in a turn",
    "threads": "units in flight, each with its own writer, and puts in flight of the bare client",
    "pairs": "turns of each",
    "layers": "captured layers",
    "hidden": "model width",
}


# ---- what is written --------------------------------------------------------------------------------------------------


class Work:
    """A made-up run: its plan, and units of any batch. Batches differ in the indices of their rows alone."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        num_rows = settings.batches * settings.units * settings.unit_rows
        keys = tuple(RowKey(ARCHETYPES[i % len(ARCHETYPES)], 0, i // len(ARCHETYPES)) for i in range(num_rows))
        self.plan = Plan(archetypes=ARCHETYPES, default_archetypes=ARCHETYPES[:1], keys=keys, unit_rows=settings.unit_rows)

    def prepare(self, url: str) -> None:
        """The empty store."""
        s = self.settings
        identity = Identity(
            model_id="benchmark/none",
            model_revision=None,
            model_config_digest="none",
            tokenizer_digest="none",
            template_digest="none",
            dtype="bfloat16",
            attention="none",
            span_rule="none",
            layers=tuple(range(s.layers)),
            hidden_size=s.hidden,
            rollouts={"source": "benchmark"},
            max_length=TEXT_TOKENS + ANSWER_TOKENS,
            unit_rows=s.unit_rows,
            store_dtype="bf16-exact",
        )
        prepare_store(url, identity=identity, plan=self.plan, job={"name": "benchmark"})

    def indices(self, batch: int) -> range:
        """Units of a batch."""
        return range(batch * self.settings.units, (batch + 1) * self.settings.units)

    def batch(self, batch: int) -> list[CapturedUnit]:
        """Units of a batch, ready to be written."""
        return [self._unit(unit, unit - self.indices(batch).start) for unit in self.indices(batch)]

    @cached_property
    def _values(self) -> list[Float32]:
        """(R, L, D) for each place in a batch."""
        s = self.settings
        return [like_a_residual_stream(np.random.default_rng([1, i]), s.unit_rows, s.layers, s.hidden) for i in range(s.units)]

    @cached_property
    def _texts(self) -> list[tuple[Rollout, ...]]:
        """Rows for each place in a batch, as if it were the first."""
        rng = np.random.default_rng(2)
        return [tuple(_rollout(rng) for _ in range(self.settings.unit_rows)) for _ in range(self.settings.units)]

    def _unit(self, unit: int, place: int) -> CapturedUnit:
        first = unit * self.settings.unit_rows
        rollouts = tuple(replace(row, index=first + i, key=self.plan.keys[first + i]) for i, row in enumerate(self._texts[place]))
        return CapturedUnit(unit, rollouts, self._values[place], {}, {"kernel": "none"})


def like_a_residual_stream(rng: np.random.Generator, num_rows: int, num_layers: int, width: int) -> Float32:
    """(R, L, D): log-normal scales of the dims, a few massive ones, growth from layer to layer, rows near to a common mean."""
    scale_D = np.exp(rng.normal(0, 0.7, width)).astype(np.float32)
    scale_D[rng.choice(width, min(NUM_MASSIVE, width), replace=False)] *= 300
    growth_L = np.geomspace(1, 30, num_layers, dtype=np.float32)
    mean_LD = rng.standard_normal((num_layers, width), dtype=np.float32)
    noise_RLD = rng.standard_normal((num_rows, num_layers, width), dtype=np.float32)
    return (mean_LD + np.float32(0.3) * noise_RLD) * scale_D * growth_L[:, np.newaxis]


def _rollout(rng: np.random.Generator) -> Rollout:
    ids = np.minimum(rng.zipf(1.2, TEXT_TOKENS + ANSWER_TOKENS), VOCABULARY).astype(np.int32)
    words = [f"{number:x}" for number in ids]
    return Rollout(
        index=0,
        key=RowKey(ARCHETYPES[0], 0, 0),
        system_prompt=" ".join(words[: TEXT_TOKENS // 2]),
        question=" ".join(words[TEXT_TOKENS // 2 : TEXT_TOKENS]),
        response=" ".join(words[TEXT_TOKENS:]),
        token_ids=ids,
        response_start=TEXT_TOKENS,
        response_end=len(ids),
        finish_reason=FinishReason.STOP,
    )


def write(writer: UnitWriter, unit: CapturedUnit) -> None:
    """As a replica does it: is there a text already? Text, numbers, marker."""
    if writer.read_rollouts(unit.index) is not None:
        raise IntegrityError(f"{writer.url}: unit {unit.index:06d} is there already; the benchmark wants an empty place")
    writer.commit(replace(unit, rollouts=writer.write_rollouts(unit.index, unit.rollouts)))


# ---- how it is measured -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Took:
    """One turn of one contestant."""

    num_bytes: float
    wall_s: float
    cpu_s: float
    """Of all threads of this process; a server is another one."""

    @property
    def mb_per_s(self) -> float:
        """Encoded."""
        return self.num_bytes / 1e6 / self.wall_s

    @property
    def cpu_s_per_gb(self) -> float:
        """Encoded."""
        return self.cpu_s / (self.num_bytes / 1e9)


def timed(num_bytes: float, work: Callable[[], object]) -> Took:
    """What `work` takes to move `num_bytes`."""
    gc.collect()
    began_s, cpu_began_s = time.perf_counter(), time.process_time()
    work()
    return Took(num_bytes, time.perf_counter() - began_s, time.process_time() - cpu_began_s)


def in_turns(num_pairs: int, contestants: Mapping[str, Callable[[int], Took]]) -> dict[str, list[Took]]:
    """Each contestant's turns: one after the other, and every second time the other way round."""
    took: dict[str, list[Took]] = {name: [] for name in contestants}
    for turn in range(num_pairs):
        for name in list(contestants)[:: 1 if turn % 2 == 0 else -1]:
            took[name].append(contestants[name](turn))
    return took


def compared(ours: Sequence[Took], bare: Sequence[Took]) -> dict[str, Any]:
    """Medians, as plain JSON values."""
    ratios = [one.mb_per_s / other.mb_per_s for one, other in zip(ours, bare, strict=True)]
    return {
        "over_bare": median(ratios),
        "pairs": ratios,
        "mb_per_s": median(one.mb_per_s for one in ours),
        "bare_mb_per_s": median(one.mb_per_s for one in bare),
        "cpu_s_per_gb": median(one.cpu_s_per_gb for one in ours),
        "bare_cpu_s_per_gb": median(one.cpu_s_per_gb for one in bare),
    }


def share_out(jobs: Iterable[T], hands: Sequence[H], do: Callable[[H, T], object]) -> None:
    """Every job by the next hand that is free; one thread for each hand."""
    left: queue.SimpleQueue[T] = queue.SimpleQueue()
    for job in jobs:
        left.put(job)

    def work(hand: H) -> None:
        while True:
            try:
                job = left.get_nowait()
            except queue.Empty:
                return
            do(hand, job)

    with ThreadPoolExecutor(len(hands)) as threads:
        for done in [threads.submit(work, hand) for hand in hands]:
            done.result()


class Requests:
    """What backends of one class are asked for while it listens; without faults a call is one request."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.keys: list[str] = []
        """Of reads."""
        self.most_at_once = 0
        self._under_way = 0
        self._lock = threading.Lock()

    def per_unit(self, num_units: int) -> dict[str, float]:
        """Kind of request -> how many."""
        return {name: count / num_units for name, count in sorted(self.counts.items())}

    @contextmanager
    def heard(self, kind: type[Backend]) -> Iterator[None]:
        """Listens to backends of class `kind`."""
        with ExitStack() as stack:
            for name in REQUESTS:
                stack.enter_context(patch.object(kind, name, self._heard(name, getattr(kind, name))))
            yield

    def _heard(self, name: str, method: Callable[..., T]) -> Callable[..., T]:
        def call(backend: Backend, key: str, *rest: Any) -> T:
            with self._lock:
                self.counts[name.strip("_")] += 1
                self.keys += [key] if name == "get_or_none" else []
                self._under_way += 1
                self.most_at_once = max(self.most_at_once, self._under_way)
            try:
                return method(backend, key, *rest)
            finally:
                with self._lock:
                    self._under_way -= 1

        return call


def reset_peak() -> int:
    """The peak counts from here; what is in use now, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_bytes()


def peak_bytes() -> int:
    """Most memory of this process since `reset_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


# ---- what is measured -------------------------------------------------------------------------------------------------


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

    def peaks(self) -> dict[str, Any] | None:
        """Memory above the start of a process that only writes, and of one that only reads; None where the system does not tell."""
        if not Path("/proc/self/clear_refs").exists():
            return None
        peaks = {what: self._peak_mb(what) for what in (WRITING, READING)}
        return {"unit_float32_mb": self.settings.unit_float32_bytes / 1e6, **peaks}

    def _peak_mb(self, what: str) -> float:
        given = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(self.settings).items()]
        command = [sys.executable, __file__, "--peak", what, "--url", self.store_url, *given]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise IntegrityError(f"{self.store_url}: the process that measures the memory of {what} ended with {done.returncode}")
        return float(done.stdout)

    @property
    def _num_bytes(self) -> int:
        return sum(map(len, self._objects.values()))

    def _activation_sizes(self) -> list[int]:
        return [item.num_bytes for item in self._backend.list_objects("activations/c")]


def put(backend: Backend, key: str, data: bytes) -> None:
    """The client's plain put: no condition, no digest, and durable as ever."""
    backend._replace(key, data)  # the store itself has no use for it


def peak_of(what: str, url: str, settings: Settings) -> float:
    """MB above the start, of a process that does nothing else. The units that are to be written are there before the start."""
    work = Work(settings)
    if what == READING:
        store = open_store(url)
        units = range(settings.units * (settings.batches - 1))
        reads = store.scored_rows(units, None)
        next(reads)
        start = reset_peak()
        for _ in reads:
            pass
        return (peak_bytes() - start) / 1e6
    first, *others = work.batch(settings.batches - 1)
    writers = [UnitWriter(url) for _ in range(settings.threads)]
    write(writers[0], first)
    start = reset_peak()
    share_out(others, writers, write)
    return (peak_bytes() - start) / 1e6


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


# ---- where ------------------------------------------------------------------------------------------------------------


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


@contextmanager
def moto() -> Iterator[str]:
    """URL of a bucket on a server made for tests, in a process of its own; the environment says how to reach it."""
    if importlib.util.find_spec("moto") is None:
        raise InputError("--moto needs the package moto: pip install 'moto[server]'")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    access = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_REGION": "us-east-1"}
    others = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    # Its log is one line for each request.
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], **quiet)
    try:
        _create_bucket(f"{endpoint}/benchmark", server)
        with patch.dict(os.environ, others | access, clear=True):
            yield "s3://benchmark"
    finally:
        server.kill()
        server.wait()


def _create_bucket(bucket: str, server: subprocess.Popen[bytes]) -> None:
    """As soon as the server is there."""
    end_s = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(urllib.request.Request(bucket, method="PUT"), timeout=10).close()
        except OSError as error:
            if server.poll() is not None or time.monotonic() > end_s:
                raise InputError(f"--moto: the server does not start ({error}); does `python -m moto.server` run here?") from error
            time.sleep(0.1)
        else:
            return


# ---- the story --------------------------------------------------------------------------------------------------------


def benchmark(settings: Settings, urls: Sequence[str], *, with_moto: bool, store: str | None) -> dict[str, Any]:
    """Everything that was measured, as plain JSON values."""
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
        document["places"] = [measured(url, url, work, document) for url in urls]
    if with_moto:
        with moto() as url:
            document["places"].append(measured("moto", url, work, document))
    if store is not None:
        document["encoded"] = {"share": encoded_share(store), "of": store}
    return document


def measured(name: str, url: str, work: Work, document: dict[str, Any]) -> dict[str, Any]:
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
        return {"place": name, WRITING: writing, READING: reading, "layer": layer, "peak_mb_above_start": bench.peaks()}


def tell(line: str) -> None:
    """Before every long piece of work."""
    print(line, file=sys.stderr, flush=True)


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


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="How fast a store is written and read, beside the bare client.")
    parser.add_argument("--url", action="append", default=[], help="folder, or s3:, gs: or az: URL, below which to write; again for more")
    parser.add_argument("--moto", action="store_true", help="also on a moto server, started for this")
    parser.add_argument("--store", help="a store with real activations, whose encoded share is told")
    parser.add_argument("--json", type=Path, help="file for everything that was measured")
    parser.add_argument("--peak", choices=(WRITING, READING), help=argparse.SUPPRESS)
    for name, default in asdict(Settings()).items():
        shown = f"{HELP[name]} (default: {default!r})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=shown)
    given = parser.parse_args(arguments)
    given.settings = Settings(**{name: getattr(given, name) for name in HELP})
    if min(asdict(given.settings).values()) <= 0:
        parser.error("units, threads, pairs and sizes are larger than nothing")
    return given


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 done, 1 failed at work, 2 wrong input."""
    given = parsed(arguments)
    try:
        if given.peak is not None:
            print(peak_of(given.peak, given.url[0], given.settings))
            return 0
        document = benchmark(given.settings, given.url, with_moto=given.moto, store=given.store)
    except PersonaRayError as error:
        print(f"benchmark: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    if given.json is not None:
        given.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print("\n".join(lines(document)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
