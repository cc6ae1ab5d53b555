"""The files for Ray's own autoscaler: by Ray's validation, and AWS's launch settings by the service model of EC2."""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import click
import jsonschema
import pytest
from ray._private.label_utils import validate_node_label_syntax
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from persona_ray.config import load_job
from persona_ray.shards.actors.placement import ACCELERATOR_LABEL
from persona_ray.shards.hardware import ACCELERATORS
from tests.cluster_files.files import CLUSTER, JOBS, PINS, ROOT, load

FILES = [CLUSTER / "aws.yaml", CLUSTER / "gcp.yaml"]
GCP_INSTANCE: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["machineType", "disks"],
    "properties": {
        "machineType": {"type": "string", "pattern": "^[a-z][a-z0-9]*-[a-z0-9-]+$"},
        "disks": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "boot": {"type": "boolean"},
                    "autoDelete": {"const": True},
                    "type": {"enum": ["PERSISTENT", "SCRATCH"]},
                    "initializeParams": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {
                            "diskSizeGb": {"type": "integer", "minimum": 100},
                            "diskType": {"type": "string", "pattern": "^projects/.+/zones/.+/diskTypes/(pd-balanced|pd-ssd)$"},
                            "sourceImage": {"type": "string", "pattern": "^projects/.+/global/images/family/.+$"},
                        },
                    },
                },
            },
        },
        "serviceAccounts": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["email", "scopes"],
                "properties": {
                    "email": {"type": "string", "pattern": "^.+@.+[.]iam[.]gserviceaccount[.]com$"},
                    "scopes": {"type": "array", "items": {"type": "string", "pattern": "^https://www[.]googleapis[.]com/auth/"}},
                },
            },
        },
        "metadata": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "items": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["key", "value"],
                        "properties": {"key": {"type": "string"}, "value": {"type": "string"}},
                    },
                }
            },
        },
        "scheduling": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "provisioningModel": {"enum": ["SPOT", "STANDARD"]},
                "instanceTerminationAction": {"enum": ["DELETE", "STOP"]},
                "onHostMaintenance": {"enum": ["TERMINATE", "MIGRATE"]},
            },
        },
    },
}
"""The fields of Compute Engine's Instance that the file uses, closed."""


def _workers(config: dict[str, Any]) -> dict[str, Any]:
    return {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}


def _commands(path: Path) -> list[str]:
    """Lines that a shell gets."""
    if path in FILES:
        config = load(path)
        return [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    text = "\n".join(re.findall(r"^```bash\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))
    return (text or load(path)["run"]).splitlines()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_ray_takes_it(path: Path) -> None:
    config = load(path)
    validate_config(prepare_config(copy.deepcopy(config)))
    for kind in config["available_node_types"].values():
        validate_node_label_syntax(kind.get("labels", {}))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_ray_would_not_take_another_key(path: Path) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(load(path) | {"idle_timeout": 5}))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_head_stays_and_gpus_come_with_the_work(path: Path) -> None:
    config = prepare_config(load(path))
    head, workers = config["available_node_types"][config["head_node_type"]], _workers(config)
    assert "GPU" not in head["resources"]
    assert head["max_workers"] == 0
    assert not _is_spot(head["node_config"])
    assert workers
    assert 0 < config["idle_timeout_minutes"] <= 30
    for kind in workers.values():
        assert kind["min_workers"] == 0
        assert 0 < kind["max_workers"] <= config["max_workers"]
        assert kind["resources"]["GPU"] >= 1
        assert _is_spot(kind["node_config"])


def _is_spot(node: dict[str, Any]) -> bool:
    on_aws = node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
    return bool(on_aws or node.get("scheduling", {}).get("provisioningModel") == "SPOT")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_job_finds_the_accelerator_that_it_asks_for(path: Path) -> None:
    """Of nodes that are not there yet Ray knows what their node type says, and nothing else."""
    offered = {kind["labels"][ACCELERATOR_LABEL] for kind in _workers(load(path)).values()}
    asked = {load_job(file).shards.accelerator for file in JOBS.glob("*.yaml")} - {None}
    assert asked <= offered <= set(ACCELERATORS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nodes_get_the_token_the_package_and_the_pins(path: Path) -> None:
    config = load(path)
    mounts = config["file_mounts"]
    assert mounts["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    for target, source in mounts.items():
        assert source.startswith("~") or (ROOT / source).exists(), source
        assert target.startswith("/home/ray/")
    needed = {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "persona_ray"}  # what the build back-end reads
    assert needed <= set(mounts.values())
    assert any("PIP_CONSTRAINT=constraints.txt pip install" in line and "[engine]" in line for line in config["setup_commands"])
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert any(re.search(r"RAY_AUTH_MODE=token ray start", line) for line in commands)
    head = " ".join(config["head_start_ray_commands"])
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert "--dashboard-host=127.0.0.1" in head


@pytest.mark.parametrize("path", [*FILES, CLUSTER / "Dockerfile", *CLUSTER.glob("kuberay-*.yaml")], ids=lambda path: path.name)
def test_ray_is_the_pinned_one_everywhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"rayproject/ray:([0-9.]+)-py3(\d+)", text)
    versions = [version for version, _ in named] + re.findall(r'rayVersion: "([0-9.]+)"', text)
    assert versions
    assert set(versions) == {PINS["ray"]}
    assert {minor for _, minor in named} <= {"11", "12"}


def test_the_image_copies_what_is_there() -> None:
    lines = (CLUSTER / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[2:-1]]
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "persona_ray", "jobs"} == set(copied)
    assert all((ROOT / name).exists() for name in copied)


RAY_STARTS = [
    (path.name, found[1])
    for path in [*FILES, CLUSTER / "README.md", CLUSTER / "skypilot.yaml"]
    for line in _commands(path)
    if (found := re.search(r"ray start ([^;&|`]+)", line.partition("  #")[0]))
]


@pytest.mark.parametrize(("name", "options"), RAY_STARTS)
def test_ray_start_has_these_options(name: str, options: str) -> None:
    words = shlex.split(options.strip().strip('"').replace("$SKYPILOT_NUM_GPUS_PER_NODE", "8"))
    assert start.make_context("ray start", words)


def test_every_file_starts_ray() -> None:
    assert {name for name, _ in RAY_STARTS} == {"aws.yaml", "gcp.yaml", "README.md", "skypilot.yaml"}
    with pytest.raises(click.UsageError):
        start.make_context("ray start", ["--heads"])


@pytest.fixture(scope="module")
def run_instances() -> Any:
    """Input of EC2's RunInstances."""
    return botocore.session.Session().get_service_model("ec2").operation_model("RunInstances").input_shape


@pytest.mark.parametrize("name", load(FILES[0])["available_node_types"])
def test_ec2_takes_the_launch_settings(name: str, run_instances: Any) -> None:
    settings = load(FILES[0])["available_node_types"][name]["node_config"] | {"MinCount": 1, "MaxCount": 1}
    report = botocore.validate.ParamValidator().validate(settings, run_instances)
    assert not report.has_errors(), report.generate_report()
    wrong = botocore.validate.ParamValidator().validate(settings | {"InstanceTyp": "p5"}, run_instances)
    assert wrong.has_errors()
    market = settings.get("InstanceMarketOptions", {"MarketType": "spot"})["MarketType"]
    assert market in run_instances.members["InstanceMarketOptions"].members["MarketType"].enum
    assert settings["InstanceType"] in run_instances.members["InstanceType"].enum


@pytest.mark.parametrize("name", load(FILES[1])["available_node_types"])
def test_compute_engine_takes_the_launch_settings(name: str) -> None:
    settings = load(FILES[1])["available_node_types"][name]["node_config"]
    jsonschema.validate(settings, GCP_INSTANCE)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(settings | {"preemptible": True}, GCP_INSTANCE)


def test_node_types_have_what_the_machines_have() -> None:
    """vCPUs and GPUs, as the clouds list them."""
    machines = {"p5.4xlarge": (16, 1), "p5.48xlarge": (192, 8), "a3-highgpu-1g": (26, 1), "a3-highgpu-8g": (208, 8)}
    for path in FILES:
        for kind in _workers(load(path)).values():
            node = kind["node_config"]
            machine = node.get("InstanceType") or node["machineType"]
            assert (kind["resources"]["CPU"], kind["resources"]["GPU"]) == machines[machine]
