"""Metrics on their way to Prometheus: each node's Ray agent collects them from the processes, and exports them at its metrics port."""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge, Histogram

from persona_ray.metrics import METRICS, Kind, Metric


class RayExporter:
    """Implements `metrics.Recorder` in a process that is connected to Ray. Every ten seconds, by default."""

    def __init__(self, **tags: str) -> None:
        """`tags`: what holds for all that this process records, `run` among it; a record's own tags go before."""
        self._tags = tags
        # All at once: two threads must not make the same one.
        self._instruments = {metric.name: _instrument(metric) for metric in METRICS}

    def record(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        """See `metrics.Recorder`."""
        known = {**self._tags, **tags}
        wanted = {name: known.get(name, "") for name in ("run", *metric.tags)}
        match self._instruments[metric.name]:
            case Counter() as counter:
                if value > 0:  # Ray's refuse zero
                    counter.inc(value, wanted)
            case Gauge() as gauge:
                gauge.set(value, wanted)
            case Histogram() as histogram:
                histogram.observe(value, wanted)


def _instrument(metric: Metric) -> Counter | Gauge | Histogram:
    tag_keys = ("run", *metric.tags)
    match metric.kind:
        case Kind.COUNTER:
            return Counter(metric.name, metric.description, tag_keys)
        case Kind.GAUGE:
            return Gauge(metric.name, metric.description, tag_keys)
        case Kind.HISTOGRAM:
            return Histogram(metric.name, metric.description, list(metric.bounds), tag_keys)
