"""Where replicas land on a cluster of several nodes, what is said when there is no room, and growing when there is. GPUs are pretended."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.util.placement_group import placement_group_table, remove_placement_group

from persona_ray.errors import InputError
from persona_ray.scheduler.driver import Driver
from persona_ray.scheduler.state import Rules, SchedulerState
from persona_ray.shards.actors.placement import ACCELERATOR_LABEL, bundles_of, in_words, is_placed, require_room, reserve
from persona_ray.shards.actors.replicas import Replicas
from persona_ray.shards.plan import ReplicaSpec, StageSpec, plan_stages
from persona_ray.spec import Engine, Receipt, Unit


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[Cluster]:
    """A head without GPUs, two nodes of four H100, one of two L4."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "include_dashboard": False})
    for num_gpus, accelerator in ((4, "H100"), (4, "H100"), (2, "L4")):
        cluster.add_node(num_cpus=1, num_gpus=num_gpus, labels={ACCELERATOR_LABEL: accelerator})
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def spec_of(
    folder: Path | str, *, num_stages: int = 1, tensor_parallel: int = 1, gpus_per_shard: float = 1, accelerator: str | None = None
) -> ReplicaSpec:
    """The shards compute on the CPU and reserve pretended GPUs."""
    whole = StageSpec(
        location=str(folder),
        revision=None,
        dtype="float32",
        attention="sdpa",
        first_layer=0,
        end_layer=4,
        num_layers=4,
        captured=(0,),
        device="cpu",
        tensor_parallel=tensor_parallel,
    )
    return ReplicaSpec(
        stages=plan_stages(whole, [(stage, stage + 1) for stage in range(num_stages)] if num_stages > 1 else [(0, 4)]),
        batch_tokens=60,
        decode_tokens=60,
        step_cost_tokens=0,
        stop_ids=(1,),
        gpus_per_shard=gpus_per_shard,
        accelerator=accelerator,
        shard_bytes=5_000_000,
        transport="object-store",
    )


def nodes_of(group: Any) -> list[str]:
    """Node of each bundle."""
    found: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return [found[stage] for stage in sorted(found)]


def eventually(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def test_ranks_share_a_node_and_stages_are_packed_where_they_fit(three_nodes: Cluster) -> None:
    packed = reserve(spec_of("", num_stages=2, tensor_parallel=2), "packed")
    assert packed.wait(30)
    assert len(set(nodes_of(packed))) == 1, "two stages of two ranks fit a node of four"
    remove_placement_group(packed)
    wide = reserve(spec_of("", num_stages=2, tensor_parallel=4, accelerator="H100"), "wide")
    assert wide.wait(30)
    labels = {node["NodeID"]: node["Labels"].get(ACCELERATOR_LABEL) for node in ray.nodes()}
    assert len(set(nodes_of(wide))) == 2
    assert {labels[node] for node in nodes_of(wide)} == {"H100"}
    waiting = reserve(spec_of("", num_stages=4, accelerator="H100"), "waiting")
    assert not is_placed(waiting)
    eventually(lambda: in_words(spec_of("", num_stages=4, accelerator="H100")) == "waiting for 4 H100 GPUs, 2 free")
    remove_placement_group(wide)
    assert waiting.wait(30), "what was waited for has come"
    remove_placement_group(waiting)


@pytest.mark.parametrize(
    ("spec", "count", "complaint"),
    [
        (spec_of("", num_stages=3, tensor_parallel=4), 1, r"1 replicas of 12 GPUs, the cluster has 10. Use fewer shards"),
        (spec_of("", num_stages=2), 6, "6 replicas of 2 GPUs, the cluster has 10"),
        (spec_of("", tensor_parallel=8), 1, r"8 ranks share a node, and the nodes have 0, 2, 4, 4 GPUs.*smaller tensor_parallel"),
        (spec_of("", accelerator="B200"), 1, "no node of the cluster has a B200; it has H100, L4"),
        (spec_of("", num_stages=2, tensor_parallel=2, accelerator="L4"), 1, "1 replicas of 4 L4 GPUs, the cluster has 2"),
        (replace(spec_of("", gpus_per_shard=0), shard_bytes=10**15), 1, r"a stage of 1000000.0 GB of weights, .* Use more stages"),
    ],
)
def test_a_replica_that_can_never_have_room_is_refused_in_words(
    three_nodes: Cluster, spec: ReplicaSpec, count: int, complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint) as refused:
        require_room(spec, count)
    assert "\n" not in str(refused.value)
    require_room(spec_of("", num_stages=2, tensor_parallel=4), 1)


def test_a_shard_on_a_cpu_reserves_memory_and_no_cpu() -> None:
    assert bundles_of(spec_of("", num_stages=2, gpus_per_shard=0, tensor_parallel=2)) == [{"memory": 10_000_000}] * 2
    assert bundles_of(spec_of("", num_stages=2, gpus_per_shard=0.5, tensor_parallel=2)) == [{"GPU": 1.0}] * 2


def test_without_a_fixed_number_replicas_fill_the_cluster_and_a_node_that_joins(
    chat_model: Path, tmp_path: Path, three_nodes: Cluster
) -> None:
    """Two replicas of four GPUs at first; a third when a node joins in the middle of the run, which then does units, too."""
    units = {index: Unit(index, ()) for index in range(60)}
    spec = spec_of(chat_model, gpus_per_shard=4)
    joined: list[Any] = []

    def on_receipt(_: Receipt) -> None:
        if not joined:
            joined.append(three_nodes.add_node(num_cpus=1, num_gpus=4))

    work = UntilThreeNodesWorked(tmp_path)
    with Replicas(spec, work, count="auto", name="growing") as replicas:
        replicas.check()
        eventually(lambda: replicas.look_around() or len(replicas.handles) == 2)
        assert replicas.waits_for == "waiting for 4 GPUs, 2 free"
        Driver(
            SchedulerState(dict.fromkeys(units, 1), rules=Rules(leases_per_replica=spec.concurrent_units, parts=1)), units, replicas
        ).run(on_receipt)
        assert len(replicas.handles) == 3
    nodes = Counter(path.read_text() for path in tmp_path.iterdir())
    assert nodes.total() == 60
    assert len(nodes) == 3
    eventually(lambda: ray.available_resources().get("GPU") == 14)
    three_nodes.remove_node(joined[0])


class UntilThreeNodesWorked:
    """Work that leaves a note of the node that did it, and after some units waits for notes of three nodes, so that the third gets one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, unit: Unit, engine: Engine) -> Receipt:
        (self.folder / str(unit.index)).write_text(ray.get_runtime_context().get_node_id())
        notes = list(self.folder.iterdir())
        if len(notes) > 10:
            eventually(lambda: len({note.read_text() for note in self.folder.iterdir()} - {""}) == 3, seconds=150)
        return Receipt(unit.index, 0, 0, 0, 0.0)


def test_a_node_that_the_cloud_will_take_away_finishes_what_it_holds_and_gets_no_more(
    chat_model: Path, tmp_path: Path, three_nodes: Cluster
) -> None:
    """A preemption notice, as a cloud gives it to Ray; the node is gone when it has done its part, and nothing is done twice."""
    nodes = [three_nodes.add_node(num_cpus=1, num_gpus=1, labels={ACCELERATOR_LABEL: "A100"}) for _ in range(2)]
    spec = spec_of(chat_model, accelerator="A100")
    units = {index: Unit(index, ()) for index in range(12)}
    state = SchedulerState(dict.fromkeys(units, 1), rules=Rules(leases_per_replica=spec.concurrent_units, parts=1, window=1))
    doomed: list[str] = []
    held: set[int] = set()

    def on_receipt(_: Receipt) -> None:
        if not doomed:
            (node,) = nodes_of(replicas._asked_for[0])
            doomed.append(node)
            preempt(node)

    def look() -> None:
        if state.draining and not held:
            held.update(lease.task.unit for lease in state.leases.values() if lease.replica == 0)
            say(tmp_path, "drained", doomed[0])
        elif held and held <= state.stored and not (tmp_path / "gone").exists():
            three_nodes.remove_node(next(node for node in nodes if node.node_id == doomed[0]))
            say(tmp_path, "gone", doomed[0])

    with Replicas(spec, UnitsAroundALoss(tmp_path), count=2, name="preempted") as replicas:
        eventually(lambda: replicas.look_around() or len(replicas.handles) == 2)
        for handle in replicas.handles.values():
            ray.get(handle.ready.remote())
        Driver(state, units, replicas, stop_reason=look).run(on_receipt)
    state.validate()
    assert state.stored == set(units)
    assert state.num_retries == 0, "nothing was lost, so nothing was done twice"
    done = {unit: (tmp_path / f"{unit}.done").read_text() for unit in units}
    assert held
    assert {unit for unit, node in done.items() if node == doomed[0]} - {0} == held
    three_nodes.remove_node(next(node for node in nodes if node.node_id != doomed[0]))


def preempt(node: str) -> None:
    """Tells Ray that the node will be taken away in ten minutes."""
    deadline_ms = int((time.time() + 600) * 1000)
    gcs = GcsClient(ray.get_runtime_context().gcs_address)
    accepted, why_not = gcs.drain_node(node, DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "spot", deadline_ms)
    assert accepted, why_not


def say(folder: Path, name: str, text: str) -> None:
    """A note that is there only when it is whole."""
    (folder / f"{name}.new").write_text(text)
    (folder / f"{name}.new").rename(folder / name)


class UnitsAroundALoss:
    """Work that leaves a note of the node that did it. After the first unit it waits for the notice, and elsewhere for the loss."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, unit: Unit, engine: Engine) -> Receipt:
        node = ray.get_runtime_context().get_node_id()
        if unit.index:
            eventually((self.folder / "drained").exists, seconds=150)
            if (self.folder / "drained").read_text() != node:
                eventually((self.folder / "gone").exists, seconds=150)
        say(self.folder, f"{unit.index}.done", node)
        return Receipt(unit.index, 0, 0, 0, 0.0)
