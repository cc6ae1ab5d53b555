"""SkyPilot's file: its documented keys, closed, and its shell."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import jsonschema
import pytest

from persona_ray.config import load_job
from tests.cluster_files.files import CLUSTER, ROOT, load

TASK: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["resources", "run"],
    "properties": {
        "name": {"type": "string"},
        "workdir": {"type": "string"},
        "num_nodes": {"type": "integer", "minimum": 1},
        "resources": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "infra": {"type": "string"},
                "accelerators": {"type": "string", "pattern": r"^[A-Z][A-Za-z0-9-]*(:\d+)?$"},
                "use_spot": {"type": "boolean"},
                "disk_size": {"type": "integer", "minimum": 50},
                "job_recovery": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "strategy": {"enum": ["FAILOVER", "EAGER_NEXT_REGION", None]},
                        "max_restarts_on_errors": {"type": "integer", "minimum": 0},
                    },
                },
            },
        },
        "envs": {"type": "object", "additionalProperties": {"type": ["string", "null"]}},
        "secrets": {"type": "object", "additionalProperties": {"type": ["string", "null"]}},
        "setup": {"type": "string"},
        "run": {"type": "string"},
    },
}
"""The keys of SkyPilot's task that the file uses. Its own package brings clouds' SDKs, servers and a database."""
GIVEN = {"SKYPILOT_NODE_IPS", "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES", "SKYPILOT_NUM_GPUS_PER_NODE"}
"""What SkyPilot sets on every node."""
TASK_FILE = load(CLUSTER / "skypilot.yaml")


def test_skypilot_has_these_keys() -> None:
    jsonschema.Draft202012Validator.check_schema(TASK)
    jsonschema.validate(TASK_FILE, TASK)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(TASK_FILE | {"resource": {}}, TASK)


@pytest.mark.parametrize("part", ["setup", "run"])
def test_bash_can_read_it(part: str) -> None:
    subprocess.run(["bash", "-n"], input=TASK_FILE[part], text=True, check=True)


def test_it_uses_nothing_that_nobody_sets() -> None:
    text = TASK_FILE["setup"] + TASK_FILE["run"]
    used = set(re.findall(r"\$\{?([A-Za-z_]+)", text))
    own = set(re.findall(r"^\s*([A-Za-z_]+)=", text, flags=re.MULTILINE))
    assert used <= GIVEN | own | set(TASK_FILE["envs"]) | set(TASK_FILE["secrets"])


def test_it_is_on_spot_with_the_token_and_leaves_skypilots_own_ray_alone() -> None:
    run = TASK_FILE["run"]
    assert TASK_FILE["resources"]["use_spot"]
    assert TASK_FILE["secrets"]["RAY_AUTH_TOKEN"] is None  # to be given; a default would be known to everybody
    assert "RAY_AUTH_MODE=token" in run
    assert not {"6380", "8266"} & set(re.findall(r"\d{4}", re.sub(r"#.*", "", run)))
    assert not re.search(r"^\s*ray stop", run, flags=re.MULTILINE)


def test_its_gpus_hold_a_replica_of_its_job() -> None:
    shards = load_job(ROOT / TASK_FILE["envs"]["JOB"]).shards
    kind, number = TASK_FILE["resources"]["accelerators"].split(":")
    assert kind == shards.accelerator
    assert int(number) * TASK_FILE["num_nodes"] >= int(shards.stages) * shards.tensor_parallel
