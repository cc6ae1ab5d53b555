"""The memory that writing takes, and reading: each in a process that does nothing else."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from persona_ray.bench_store.hands import share_out
from persona_ray.bench_store.settings import Settings
from persona_ray.bench_store.work import Work, write
from persona_ray.errors import IntegrityError
from persona_ray.store.reader import open_store
from persona_ray.store.writer import UnitWriter

WRITING, READING = "writing", "reading"


def peaks_above_start(url: str, settings: Settings) -> dict[str, Any] | None:
    """MB of a process that only writes into the store at `url`, and of one that only reads it; None where the system does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    peaks = {what: _apart(what, url, settings) for what in (WRITING, READING)}
    return {"unit_float32_mb": settings.unit_float32_bytes / 1e6, **peaks}


def _apart(what: str, url: str, settings: Settings) -> float:
    """`_peak_mb` in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(_peak_mb, what, url, settings).result()
        except BrokenProcessPool as error:
            raise IntegrityError(f"{url}: the process that measures the memory of {what} was killed ({error})") from error


def _peak_mb(what: str, url: str, settings: Settings) -> float:
    """MB above the start. The units that are to be written are there before the start."""
    work = Work(settings)
    if what == READING:
        store = open_store(url)
        units = range(settings.units * (settings.batches - 1))
        reads = store.scored_rows(units, None)
        next(reads)
        start = _reset_peak()
        for _ in reads:
            pass
        return (_peak_bytes() - start) / 1e6
    first, *others = work.batch(settings.batches - 1)
    writers = [UnitWriter(url) for _ in range(settings.threads)]
    write(writers[0], first)
    start = _reset_peak()
    share_out(others, writers, write)
    return (_peak_bytes() - start) / 1e6


def _reset_peak() -> int:
    """The peak counts from here; what is in use now, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _peak_bytes()


def _peak_bytes() -> int:
    """Most memory of this process since `_reset_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
