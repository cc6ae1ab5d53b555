"""What a run counts while it goes on: every metric in one table, and `record`, by which any part says what has happened.

It is done as logging is: a part records, and knows nothing of who listens. Nobody does until a process says so by `record_to`; until
then a record costs a look at one attribute. Ray's exporter listens in a run's driver and in its actors (`shards.actors.exporter`).
Values only: no Ray, no clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

DRIVER = "driver"
"""Value of the tag `replica` for what a run's driver does itself."""


class Kind(Enum):
    """What a metric's numbers mean, in Prometheus' terms."""

    COUNTER = "counter"
    """Records are added up."""
    GAUGE = "gauge"
    """The last record of a process counts."""
    HISTOGRAM = "histogram"
    """Records are counted by size. Ray sums them up by the middles of the buckets, so `_sum` is approximate."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One line of the table. Ray puts `ray_` in front of the name, and adds tags of its own: node, session, process."""

    name: str
    kind: Kind
    description: str
    tags: tuple[str, ...] = ("replica",)
    """Besides `run`, which every metric has."""
    bounds: tuple[float, ...] = ()
    """Upper ends of a histogram's buckets."""
    needs: str | None = None
    """Without which no run records it; None: every run does, or does as soon as it happens."""


ROWS = Metric(
    "persona_ray_rows_total", Kind.COUNTER, "Rows of units that this run has committed; outcome: stored or refused", ("replica", "outcome")
)
UNITS = Metric("persona_ray_units_total", Kind.COUNTER, "Units that this run has committed")
UNIT_SECONDS = Metric(
    "persona_ray_unit_seconds",
    Kind.HISTOGRAM,
    "From a unit's text to its marker; units of one replica overlap",
    bounds=(0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000),
)
UNITS_LEFT = Metric("persona_ray_units_left", Kind.GAUGE, "Units that are neither stored nor given up", tags=())
LEASES = Metric("persona_ray_leases", Kind.GAUGE, "Tasks that the replica has under way")
REPLICAS = Metric("persona_ray_replicas", Kind.GAUGE, "Replicas; state: loading, ready, draining or retired", ("state",))
RETRIES = Metric(
    "persona_ray_retries_total",
    Kind.COUNTER,
    "Tasks that have to be leased again; reason: failed, lost (with their replica) or overdue",
    ("replica", "reason"),
)
RESTARTS = Metric(
    "persona_ray_restarts_total", Kind.COUNTER, "Replicas that are started again; reason: lost or overdue", ("replica", "reason")
)
TOKENS = Metric(
    "persona_ray_tokens_total",
    Kind.COUNTER,
    "Tokens without padding; phase: prompt (read to be answered), generated, or captured (read to be measured)",
    ("replica", "phase"),
)
PADDING_TOKENS = Metric(
    "persona_ray_padding_tokens_total", Kind.COUNTER, "Padding that was computed with them; phase: prompt or captured", ("replica", "phase")
)
BATCH_SECONDS = Metric(
    "persona_ray_batch_seconds",
    Kind.HISTOGRAM,
    "From handing a batch to the first stage to its last result; phase: generate (all steps) or capture. A replica's batches overlap",
    ("replica", "phase"),
    bounds=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
)
STAGE_BUSY_SECONDS = Metric(
    "persona_ray_stage_busy_seconds_total",
    Kind.COUNTER,
    "Seconds that a shard was at work; overlapping batches count once",
    ("replica", "stage", "rank"),
)
GPU_MEMORY_BYTES = Metric(
    "persona_ray_gpu_memory_bytes",
    Kind.GAUGE,
    "Device memory that a shard's tensors take; kind: allocated (now) or peak (since its process began)",
    ("replica", "stage", "rank", "kind"),
    needs="a GPU",
)
STORE_REQUESTS = Metric(
    "persona_ray_store_requests_total",
    Kind.COUNTER,
    "Requests to the store, however often tried; operation: create, read or list",
    ("replica", "operation"),
)
STORE_SECONDS = Metric(
    "persona_ray_store_seconds_total", Kind.COUNTER, "Seconds that these requests took, waits included", ("replica", "operation")
)
STORE_BYTES = Metric(
    "persona_ray_store_bytes_total", Kind.COUNTER, "Bytes of objects that were brought to the store, or read", ("replica", "operation")
)
STORE_RETRIES = Metric(
    "persona_ray_store_retries_total",
    Kind.COUNTER,
    "Requests that an object store failed or throttled, and that were tried again",
    needs="a throttled object store",
)

METRICS = (
    ROWS,
    UNITS,
    UNIT_SECONDS,
    UNITS_LEFT,
    LEASES,
    REPLICAS,
    RETRIES,
    RESTARTS,
    TOKENS,
    PADDING_TOKENS,
    BATCH_SECONDS,
    STAGE_BUSY_SECONDS,
    GPU_MEMORY_BYTES,
    STORE_REQUESTS,
    STORE_SECONDS,
    STORE_BYTES,
    STORE_RETRIES,
)


class Recorder(Protocol):
    """Who listens. Must be quick, must not raise, and may be called by several threads at once."""

    def record(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        """`tags`: some of the metric's own; the recorder knows the others."""
        ...


class _Listener:
    recorder: Recorder | None = None


def record(metric: Metric, value: float, **tags: str) -> None:
    """Add `value` to a counter, set a gauge to it, or count it in a histogram."""
    if _Listener.recorder is not None:
        _Listener.recorder.record(metric, value, tags)


def record_to(recorder: Recorder | None) -> None:
    """From now on everything that this process records goes there."""
    _Listener.recorder = recorder


@contextmanager
def recorded_by(recorder: Recorder) -> Iterator[None]:
    """While the `with` block lasts."""
    before = _Listener.recorder
    record_to(recorder)
    try:
        yield
    finally:
        record_to(before)
