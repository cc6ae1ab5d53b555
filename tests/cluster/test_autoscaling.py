"""A head without a GPU, and Ray's autoscaler over nodes that it pretends to buy: a fleet makes it start them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray._private import services
from ray._private.state import state as ray_state
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import ClusterConfig

from persona_ray.errors import InputError
from persona_ray.shards.actors import replicas as fleet
from persona_ray.shards.actors.autoscaling import most_gpus
from persona_ray.shards.actors.placement import ACCELERATOR_LABEL, alive_nodes
from persona_ray.shards.actors.replicas import Replicas
from persona_ray.spec import Engine, Receipt, Unit
from tests.cluster.test_placement import eventually, spec_of

HEAD_ID = f"{0:056x}"
NODE_TYPES = {
    "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
    "gpus": {
        "resources": {"CPU": 1, "GPU": 1, "object_store_memory": 80_000_000},
        "labels": {ACCELERATOR_LABEL: "H100"},
        "node_config": {},
        "min_workers": 0,
        "max_workers": 2,
    },
}
EMPTY = ("auth", "file_mounts", "docker")
NONE = ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands", "head_setup_commands")
NONE += ("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")


@pytest.fixture(scope="module")
def head() -> Iterator[None]:
    """Nodes are raylets on this machine. It ends by process group: `ray stop` would end every Ray of the machine."""
    folder = Path(tempfile.mkdtemp(prefix="grow-", dir="/tmp"))  # sockets need a short path
    port, client_port, dashboard_port = free_ports(3)
    config = {
        "cluster_name": "pretended",
        "max_workers": 2,
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": 60.0,
        "file_mounts_sync_continuously": False,
        "head_node_type": "ray.head.default",
        "available_node_types": NODE_TYPES,
        "provider": {
            # By its class, because Ray's wheels lack the defaults that its own name for this provider asks for.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        **{name: {} for name in EMPTY},
        **{name: [] for name in NONE},
    }
    (folder / "autoscaler.json").write_text(json.dumps(config))
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}",
        f"--ray-client-server-port={client_port}", f"--dashboard-port={dashboard_port}", "--include-dashboard=false", "--num-cpus=1",
        "--num-gpus=0", "--object-store-memory=80000000", f"--temp-dir={folder / 'ray'}", "--disable-usage-stats",
        f"--autoscaling-config={folder / 'autoscaler.json'}",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "disabled",
    }
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        eventually(lambda: answers(port) or process.poll() is not None)
        assert process.poll() is None, (folder / "head.log").read_text()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(services, "get_node_ip_address", lambda address=None: "127.0.0.1")  # else Ray looks on the network
            ray.init(address=f"127.0.0.1:{port}", log_to_driver=False)
            yield
    finally:
        ray.shutdown()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


class Nothing:
    """Work that nobody asks for."""

    def __call__(self, unit: Unit, engine: Engine) -> Receipt:
        raise NotImplementedError


@pytest.mark.usefixtures("head")
def test_what_no_node_could_hold_is_refused_with_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as the autoscaler has said so; the run has not waited for it in vain, and nothing was started."""
    monkeypatch.setattr(fleet, "SILENCE_S", 0.5)
    refused = pytest.raises(InputError, match=r"1 replicas of 4 GPUs, the cluster has 0, and its autoscaler has no nodes that would do\.")
    with Replicas(spec_of("", tensor_parallel=4), Nothing(), count="auto", name="too-large") as replicas, refused:
        replicas.require_one()
    assert len(alive_nodes()) == 1


@pytest.mark.usefixtures("head")
def test_a_fleet_grows_from_a_head_without_gpus_as_far_as_it_may(chat_model: Path) -> None:
    """One replica on each of the two nodes that the autoscaler may start; the third goes on waiting."""
    spec = spec_of(chat_model, accelerator="H100")
    with Replicas(spec, Nothing(), count="auto", name="growing") as replicas:
        replicas.require_one()
        assert len(replicas.handles) == 1
        eventually(lambda: replicas.look_around() or len(replicas.handles) == 2, seconds=90)
        assert sorted(node["Resources"].get("GPU", 0) for node in alive_nodes()) == [0, 1, 1]
        replicas.look_around()
        eventually(lambda: replicas.waits_for == "waiting for 1 H100 GPUs, 0 free")


@pytest.mark.usefixtures("head")
def test_where_the_node_types_are_reported_their_sum_decides_at_once() -> None:
    """By whatever manages the cluster: Ray's own autoscaler does not."""
    assert most_gpus() is None
    reported = ClusterConfig()
    group = reported.node_group_configs.add(name="gpus", min_count=0, max_count=3)
    group.resources["GPU"] = 2
    GcsClient(ray.get_runtime_context().gcs_address).report_cluster_config(reported.SerializeToString())
    assert ray_state.get_cluster_config() is not None
    assert most_gpus() == 6
    refused = pytest.raises(InputError, match=r"1 replicas of 8 GPUs, the cluster has \d and could have 6\. Use fewer shards")
    with Replicas(spec_of("", num_stages=4, tensor_parallel=2), Nothing(), count="auto", name="too-large") as replicas, refused:
        replicas.require_one()
