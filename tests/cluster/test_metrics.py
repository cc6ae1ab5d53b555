"""What the dashboard asks for is what Ray's exporter gives: a run on a real head, one of its replicas killed, scraped on loopback."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE
from ray.cluster_utils import Cluster

from persona_ray import pipeline
from persona_ray.metrics import (
    BATCH_SECONDS,
    DRIVER,
    GPU_MEMORY_BYTES,
    LEASES,
    METRICS,
    REPLICAS,
    RESTARTS,
    RETRIES,
    ROWS,
    STAGE_BUSY_SECONDS,
    STORE_BYTES,
    STORE_REQUESTS,
    STORE_RETRIES,
    TOKENS,
    UNIT_SECONDS,
    UNITS,
    UNITS_LEFT,
    Kind,
    Metric,
)
from persona_ray.spec import ProgressCallback
from tests.cluster.runs import job_for
from tests.cluster.test_placement import eventually

DASHBOARD = Path(__file__).parents[2] / "infra" / "metrics" / "dashboard.json"
Series = dict[str, list[tuple[Mapping[str, str], float]]]
"""Name -> tags and value of each series."""


def queried() -> set[str]:
    """Names of all metrics in the dashboard's expressions and variables."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    queries += [variable["definition"] for variable in dashboard["templating"]["list"] if "definition" in variable]
    return {name for query in queries for name in re.findall(r"\bray_[a-z_]+", query)}


def test_prometheus_looks_where_the_head_keeps_its_nodes() -> None:
    (scrape,) = yaml.safe_load((DASHBOARD.parent / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    assert scrape["file_sd_configs"][0]["files"] == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]


def exported_names(metric: Metric) -> set[str]:
    suffixes = ("_bucket", "_sum", "_count") if metric.kind is Kind.HISTOGRAM else ("",)
    return {f"ray_{metric.name}{suffix}" for suffix in suffixes}


def test_the_dashboard_asks_for_every_metric_and_no_other() -> None:
    by_name = {name: metric for metric in METRICS for name in exported_names(metric)}
    assert queried() <= by_name.keys()
    assert {by_name[name] for name in queried()} == set(METRICS)


def test_names_and_tags_are_as_prometheus_wants_them() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"persona_ray_[a-z]+(_[a-z]+)*", metric.name)
        assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER), metric.name
        assert bool(metric.bounds) == (metric.kind is Kind.HISTOGRAM), metric.name
        assert list(metric.bounds) == sorted(metric.bounds)


def test_the_dashboard_can_be_imported_anywhere() -> None:
    """It names no data source of its own, and no two panels share a place."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    variables = [variable["name"] for variable in dashboard["templating"]["list"]]
    assert variables == ["datasource", "run", "replica"]
    cells = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        own = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not own & cells, panel["title"]
        cells |= own
        sources = [panel["datasource"]] if "datasource" in panel else []
        sources += [target["datasource"] for target in panel.get("targets", ())]
        assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


@dataclass(frozen=True)
class Head:
    """A real one, of its own processes."""

    cluster: Cluster

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def scrape(self) -> Series:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.cluster.head_node.metrics_export_port}/metrics", timeout=30) as reply:
            text = reply.read().decode()
        series: Series = {}
        for name, tags, value in re.findall(r"^(ray_persona_ray\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
            series.setdefault(name, []).append((dict(re.findall(r'(\w+)="([^"]*)"', tags)), float(value)))
        return series

    def logged(self) -> list[dict[str, Any]]:
        """What the actors have written, line by line."""
        files = Path(self.cluster.head_node.get_logs_dir_path()).glob("worker-*.err")
        lines = [line for file in files for line in file.read_text().splitlines()]
        return [json.loads(line) for line in lines if line.startswith('{"time"')]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    settings = {"num_cpus": 2, "include_dashboard": False, "_system_config": {"metrics_report_interval_ms": 1000}}
    cluster = Cluster(initialize_head=True, head_node_args=settings)
    yield Head(cluster)
    cluster.shutdown()


def total(series: Series, metric: Metric, suffix: str = "", **tags: str) -> float:
    found = series.get(f"ray_{metric.name}{suffix}", ())
    return sum(value for own, value in found if tags.items() <= own.items())


class KillsOneReplica:
    """Progress of a run that is looked at after its first unit, and whose only replica then loses its life."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self.seen: Series = {}

    @contextmanager
    def phase(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[ProgressCallback]:
        yield self._look_and_kill if name == "rollouts and activations" else lambda _: None

    def _look_and_kill(self, _: int) -> None:
        if not self.seen:
            eventually(self._has_seen_all)
            (actor,) = [actor for actor in ray.util.list_named_actors(all_namespaces=True) if "replica" in actor["name"]]
            ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]), no_restart=False)

    def _has_seen_all(self) -> bool:
        """Each process is asked once a second for what it has recorded; the replica has done a unit at least, of four rows."""
        seen = self._head.scrape()
        is_all = seen.keys() >= WITHOUT_FAULTS and total(seen, TOKENS, phase="captured") >= 4 * 15
        self.seen = seen if is_all else {}
        return is_all


NOT_HERE = {metric for metric in METRICS if metric.needs}
WITH_FAULTS = {name for metric in (RETRIES, RESTARTS) for name in exported_names(metric)}
WITHOUT_FAULTS = {name for metric in METRICS if metric not in NOT_HERE for name in exported_names(metric)} - WITH_FAULTS


def test_a_run_exports_what_the_dashboard_asks_for(chat_model: Path, small_catalog: Path, tmp_path: Path, head: Head) -> None:
    """And the right numbers: asked = stored + refused. Some prompts leave no room for an answer; one replica is lost on the way."""
    url, progress = tmp_path / "store", KillsOneReplica(head)
    catalog = {"system_prompts": 1, "questions": 4}
    job = job_for(chat_model, small_catalog, url, catalog=catalog, capture={"max_length": 36}).model_copy(update={"name": "a-run"})
    counts = pipeline.run(job, progress, address=head.address).counts
    assert counts.refused >= 1
    assert counts.stored >= 1
    assert counts.asked == counts.stored + counts.refused == 16

    during = progress.seen
    eventually(lambda: total(head.scrape(), UNITS) == 4)
    after = head.scrape()
    assert {GPU_MEMORY_BYTES, STORE_RETRIES} == NOT_HERE
    not_here = {name for metric in NOT_HERE for name in exported_names(metric)}
    assert queried() - not_here <= during.keys() | after.keys()
    assert not not_here & (during.keys() | after.keys())
    assert all(own["run"] == "a-run" for series in (during, after) for found in series.values() for own, _ in found)

    by_outcome = {outcome: total(after, ROWS, replica="0", outcome=outcome) for outcome in ("stored", "refused")}
    assert by_outcome == {"stored": counts.stored, "refused": counts.refused}
    assert total(after, ROWS) == counts.asked
    assert total(after, UNIT_SECONDS, "_count") == 4
    assert 1 <= total(during, UNITS_LEFT) <= 4
    assert total(during, REPLICAS) == 1
    assert 0 <= total(during, LEASES, replica="0") <= 2
    assert total(after, RESTARTS, replica="0", reason="lost") == 1
    assert total(after, RETRIES, replica="0", reason="lost") >= 1

    # The replica's own. What was captured was read and generated before.
    assert total(during, TOKENS, phase="prompt") + total(during, TOKENS, phase="generated") >= total(during, TOKENS, phase="captured")
    assert total(during, BATCH_SECONDS, "_count", phase="capture") >= 1
    assert total(during, STAGE_BUSY_SECONDS, replica="0", stage="0", rank="0") > 0
    assert total(during, STORE_BYTES, replica="0", operation="create") > 0
    assert total(during, STORE_REQUESTS, replica=DRIVER, operation="create") > 0

    done = [line for line in head.logged() if "rows done" in line["message"]]
    assert {line["unit"] for line in done} == {0, 1, 2, 3}
    assert {(line["run"], line["replica"], line["stage"], line["rank"]) for line in done} == {("a-run", 0, 0, 0)}
