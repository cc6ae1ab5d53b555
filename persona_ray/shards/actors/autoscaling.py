"""What a cluster's autoscaler, if there is one, could still add.

Ray keeps an autoscaler's node types to itself. It does tell, of every place that was asked for, whether its nodes could ever hold
it; where the types are reported all the same, their sum is known as well.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray._private.state import state as ray_state
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.placement_group import PlacementGroup

MANUAL_TYPE = "node_"
"""How Ray's older autoscaler begins the names that it gives to nodes it cannot add to: each is a type of its own."""

SILENCE_S = 20.0
"""A cluster's autoscaler, or the watcher that Ray has in its place, has said a first word by then. Kubernetes may have neither."""


def has_autoscaler() -> bool:
    """Whether something may add nodes to this cluster when they are asked for. On a new cluster it may take seconds until that is known."""
    deadline = time.monotonic() + SILENCE_S
    while True:
        if _status().autoscaling_state.autoscaler_state_version > 0:
            return True
        node_types = _node_types_of_older()
        if node_types is not None:
            return any(not name.startswith(MANUAL_TYPE) for name in node_types)
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)


def is_hopeless(place: PlacementGroup) -> bool:
    """Whether the autoscaler says that its nodes, as they are used now, cannot hold the place. False as long as it says nothing."""
    asked = _status().autoscaling_state.infeasible_gang_resource_requests
    return any(request.details.startswith(f"{place.id.hex()}:") for request in asked)


def most_gpus() -> float | None:
    """GPUs of all nodes there could be; None where Ray is not told the node types."""
    most = ray_state.get_max_resources_from_cluster_config()
    return None if most is None else float(most.get("GPU", 0))


def _status() -> GetClusterStatusReply:
    reply = GetClusterStatusReply()
    reply.ParseFromString(GcsClient(ray.get_runtime_context().gcs_address).get_cluster_status())
    return reply


def _node_types_of_older() -> Collection[str] | None:
    """Of the nodes that are there, by Ray's older autoscaler; None if it has not spoken."""
    told = _internal_kv_get(DEBUG_AUTOSCALING_STATUS)
    report = json.loads(told).get("autoscaler_report") if told else None
    return None if report is None else report["active_nodes"].keys()
