"""A recorder that keeps its records, for tests of who records what."""

from __future__ import annotations

from collections.abc import Mapping

from persona_ray.metrics import Metric


class Records:
    """Implements `metrics.Recorder`."""

    def __init__(self) -> None:
        self._all: list[tuple[Metric, float, dict[str, str]]] = []

    def record(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        assert tags.keys() <= set(metric.tags), f"{metric.name} has no tag {sorted(tags.keys() - set(metric.tags))}"
        self._all.append((metric, value, dict(tags)))

    def of(self, metric: Metric, **tags: str) -> list[float]:
        return [value for other, value, own in self._all if other is metric and tags.items() <= own.items()]
