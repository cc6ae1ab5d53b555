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
from ray.cluster_utils import Cluster
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
