"""Where the shards of a replica go: one placement group for each replica, one bundle for each stage.

A bundle never spans nodes, so a stage's tensor-parallel ranks share one; stages are packed onto as few nodes as possible; and
each replica finds its place by itself, so replicas spread over what is there. GPUs are reserved as such; a shard on a CPU
reserves its weights' share of a node's memory, and no CPU, which the reduce tasks would wait for.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray._private.state import state as ray_state
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from persona_ray.errors import InputError
from persona_ray.shards.actors.autoscaling import has_autoscaler, is_hopeless, most_gpus
from persona_ray.shards.plan import ReplicaSpec

log = logging.getLogger(__name__)

ACCELERATOR_LABEL = "ray.io/accelerator-type"
MIN_SHARD_BYTES = 1_000_000
"""Ray wants something to be reserved."""


def bundles_of(spec: ReplicaSpec) -> list[dict[str, float]]:
    """What each stage reserves on its node."""
    if spec.gpus_per_shard:
        bundle = {"GPU": spec.gpus_per_shard * spec.tensor_parallel}
    else:
        bundle = {"memory": float(max(spec.shard_bytes, MIN_SHARD_BYTES) * spec.tensor_parallel)}
    return [dict(bundle) for _ in spec.stages]


def reserve(spec: ReplicaSpec, name: str) -> PlacementGroup:
    """Ask for a replica's place; answers at once, the place comes when there is room."""
    bundles = bundles_of(spec)
    selector = {} if spec.accelerator is None else {ACCELERATOR_LABEL: spec.accelerator}
    labels = [selector] * len(bundles) if selector else None
    group: PlacementGroup = placement_group(bundles, strategy="PACK", name=name, bundle_label_selector=labels)
    return group


def is_placed(group: PlacementGroup) -> bool:
    """Whether all bundles have their place."""
    return bool(group.wait(timeout_seconds=0))


def stands(group: PlacementGroup) -> bool:
    """Whether no node of the place is gone."""
    return bool(placement_group_table(group).get("state") == "CREATED")


def nodes_of(group: PlacementGroup) -> frozenset[str]:
    """Hexadecimal ids of the nodes of a place."""
    return frozenset(placement_group_table(group).get("bundles_to_node_id", {}).values())


def draining_nodes() -> frozenset[str]:
    """Hexadecimal ids of the nodes that will be taken away. Ray has no public name for them."""
    return frozenset(ray_state.get_draining_nodes())


def place_in(group: PlacementGroup, stage: int) -> dict[str, Any]:
    """Actor options: in the bundle of stage `stage`."""
    return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=stage)}


def shard_options(spec: ReplicaSpec) -> dict[str, Any]:
    """What one shard takes of its stage's bundle."""
    if spec.gpus_per_shard:
        return {"num_cpus": 0, "num_gpus": spec.gpus_per_shard}
    return {"num_cpus": 0, "memory": max(spec.shard_bytes, MIN_SHARD_BYTES)}


def require_room(spec: ReplicaSpec, count: int) -> None:
    """Raises InputError if the cluster could not hold `count` replicas even with nothing else on it, and has no autoscaler to ask."""
    try:
        _require_room(spec, count)
    except InputError:
        most = most_gpus()
        is_beyond_it = most is not None and most < spec.gpus_per_shard * spec.num_shards * count
        if is_beyond_it or not has_autoscaler():
            raise
        log.info("%d replicas do not fit into the cluster as it is now; its autoscaler is asked for more nodes", count)


def require_hope(spec: ReplicaSpec, place: PlacementGroup) -> None:
    """Raises InputError if the place of one replica will never come: nothing is in use, and the autoscaler has no nodes for it."""
    if is_hopeless(place) and _is_unused():
        _require_room(spec, 1, ", and its autoscaler has no nodes that would do")


def _is_unused() -> bool:
    """Whether all GPUs and all memory are free: waiting for others would be in vain."""
    free, there = ray.available_resources(), ray.cluster_resources()  # type: ignore[no-untyped-call]
    return all(free.get(name, 0) == there.get(name, 0) for name in ("GPU", "memory"))


def _require_room(spec: ReplicaSpec, count: int, outlook: str = "") -> None:
    """In the cluster as it is now. `outlook`: what the refusal adds."""
    nodes = alive_nodes()
    if spec.accelerator is not None:
        _require_accelerator(nodes, spec.accelerator, outlook)
        nodes = [node for node in nodes if node["Labels"].get(ACCELERATOR_LABEL) == spec.accelerator]
    if not spec.gpus_per_shard:
        return _require_memory(spec, nodes, outlook)
    gpus = [node["Resources"].get("GPU", 0) for node in nodes]
    per_stage = spec.gpus_per_shard * spec.tensor_parallel
    per_replica = per_stage * len(spec.stages)
    if sum(gpus) < per_replica * count:
        raise InputError(
            f"shards: {count} replicas of {per_replica:g} {_kind(spec)}, the cluster has {sum(gpus):g}{_could_have()}{outlook}. "
            "Use fewer shards, or shards.gpus_per_shard: 0 to run on CPU"
        )
    if sum(int(free // per_stage) for free in gpus) < len(spec.stages) * count:
        each = ", ".join(f"{number:g}" for number in sorted(gpus))
        raise InputError(
            f"shards.tensor_parallel: {spec.tensor_parallel} ranks share a node, and the nodes have {each} "
            f"GPUs{outlook}: no room for {len(spec.stages) * count} such groups of {per_stage:g}. "
            "Use a smaller tensor_parallel and more stages"
        )
    return None


def _could_have() -> str:
    most = most_gpus()
    return "" if most is None else f" and could have {most:g}"


def _require_accelerator(nodes: Sequence[Mapping[str, Any]], accelerator: str, outlook: str) -> None:
    known = sorted({node["Labels"][ACCELERATOR_LABEL] for node in nodes if ACCELERATOR_LABEL in node["Labels"]})
    if accelerator not in known:
        raise InputError(
            f"shards.accelerator: no node of the cluster has a {accelerator}; it has {', '.join(known) or 'no accelerators'}{outlook}"
        )


def _require_memory(spec: ReplicaSpec, nodes: Sequence[Mapping[str, Any]], outlook: str) -> None:
    largest = max((node["Resources"].get("memory", 0) for node in nodes), default=0)
    needed = bundles_of(spec)[0]["memory"]
    if needed > largest:
        raise InputError(
            f"shards: a stage of {needed / 1e9:.1f} GB of weights, and no node gives Ray more than "
            f"{largest / 1e9:.1f} GB of memory{outlook}. Use more stages"
        )


def alive_nodes() -> list[Mapping[str, Any]]:
    """Ray's nodes, with their resources and labels."""
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def in_words(spec: ReplicaSpec) -> str:
    """What a replica without a place waits for."""
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    if spec.gpus_per_shard:
        wanted = spec.gpus_per_shard * spec.num_shards
        return f"waiting for {wanted:g} {_kind(spec)}, {free.get('GPU', 0):g} free"
    wanted = sum(bundle["memory"] for bundle in bundles_of(spec))
    return f"waiting for {wanted / 1e9:.1f} GB of memory, {free.get('memory', 0) / 1e9:.1f} GB free"


def _kind(spec: ReplicaSpec) -> str:
    return f"{spec.accelerator} GPUs" if spec.accelerator else "GPUs"
