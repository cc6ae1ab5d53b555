"""The files for KubeRay: its fields, Kubernetes' pods, and what Ray's autoscaler reads in them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from pydantic import ValidationError
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from persona_ray.config import load_job
from persona_ray.shards.actors.placement import ACCELERATOR_LABEL
from tests.cluster_files.files import CLUSTER, JOBS, load
from tests.cluster_files.kuberay import RayCluster, RayJob

CLUSTER_FILE, JOB_FILE = load(CLUSTER / "kuberay-raycluster.yaml"), load(CLUSTER / "kuberay-rayjob.yaml")
SPECS = {"raycluster": CLUSTER_FILE["spec"], "rayjob": JOB_FILE["spec"]["rayClusterSpec"]}


def test_kuberay_has_these_fields() -> None:
    RayCluster.model_validate(CLUSTER_FILE)
    RayJob.model_validate(JOB_FILE)


@pytest.mark.parametrize(
    "place",
    [
        ("spec", "workerGroupSpec"),
        ("spec", "headGroupSpec", "rayStartParam"),
        ("spec", "workerGroupSpecs", 0, "minReplica"),
        ("spec", "workerGroupSpecs", 0, "template", "spec", "nodeSelectors"),
        ("spec", "headGroupSpec", "template", "spec", "containers", 0, "resource"),
        ("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "env", 0, "valueFrom", "secret"),
    ],
    ids=lambda place: str(place[-1]),
)
def test_a_misspelt_key_is_found(place: tuple[Any, ...]) -> None:
    document = copy.deepcopy(CLUSTER_FILE)
    parent = document
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = {}
    with pytest.raises(ValidationError):
        RayCluster.model_validate(document)


@pytest.mark.parametrize("name", SPECS)
def test_every_container_has_a_name_an_image_and_its_share(name: str) -> None:
    head, workers = SPECS[name]["headGroupSpec"], SPECS[name]["workerGroupSpecs"]
    for group in (head, *workers):
        (container,) = group["template"]["spec"]["containers"]
        assert container["name"]
        assert container["image"] == "REGISTRY/persona-ray"
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert {"cpu", "memory"} <= set(requests)
        assert all(requests[key] == value for key, value in limits.items())  # what is reserved is what may be used
        assert ("nvidia.com/gpu" in limits) == (group is not head)


@pytest.mark.parametrize("name", SPECS)
def test_ray_reads_its_node_types_in_it(name: str) -> None:
    """By the code that Ray's autoscaler runs in the head's pod; it ends with Ray's own validation."""
    cluster = {"metadata": {"name": name, "namespace": "default"}, "spec": SPECS[name]}
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert "GPU" not in head["resources"]
    assert config["idle_timeout_minutes"] == 10
    for group in SPECS[name]["workerGroupSpecs"]:
        kind = types[group["groupName"]]
        assert kind["resources"]["GPU"] == 1
        assert kind["min_workers"] == group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] == kind["max_workers"]
    offered = {kind["labels"][ACCELERATOR_LABEL] for kind in types.values()}
    assert {load_job(path).shards.accelerator for path in JOBS.glob("*.yaml")} - {None} <= offered


def test_the_cluster_that_waits_has_no_gpus_and_the_job_begins_with_one_replica() -> None:
    (waiting,), (working,) = SPECS["raycluster"]["workerGroupSpecs"], SPECS["rayjob"]["workerGroupSpecs"]
    job = load_job(JOBS / f"{JOB_FILE['metadata']['name']}.yaml")
    assert waiting["replicas"] == 0
    assert working["replicas"] == job.shards.stages * job.shards.tensor_parallel
    assert JOB_FILE["spec"]["shutdownAfterJobFinishes"]
    assert JOB_FILE["spec"]["backoffLimit"] > 0  # the same job again is how it resumes


@pytest.mark.parametrize("name", SPECS)
def test_the_token_is_on(name: str) -> None:
    assert SPECS[name]["authOptions"] == {"mode": "token"}
