"""The job file: complete, closed, and refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from persona_ray.config import Job, ReduceConfig, job_schema, load_job, parse_job, reduce_config
from persona_ray.errors import InputError

ROOT = Path(__file__).parents[1]
LEAST = {"model": {"id": "m"}, "store": {"url": "s"}}
JOB_FILES = sorted((ROOT / "jobs").glob("*.yaml"))


def test_there_are_job_files() -> None:
    assert "quickstart.yaml" in [path.name for path in JOB_FILES]


@pytest.mark.parametrize("path", JOB_FILES, ids=lambda path: path.name)
def test_every_job_file_fits_the_schema_and_the_parser(path: Path) -> None:
    jsonschema.Draft202012Validator.check_schema(job_schema())
    jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), job_schema())
    assert load_job(path).name


def test_defaults_are_those_of_the_design() -> None:
    job = parse_job(LEAST)
    assert job.as_dict() == {
        "name": "persona-ray",
        "model": {"id": "m", "revision": None, "dtype": "bfloat16", "attention": "auto", "kind": "instruct", "trust_remote_code": False},
        "shards": {
            "stages": 1,
            "tensor_parallel": 1,
            "replicas": "auto",
            "gpus_per_shard": 1.0,
            "accelerator": None,
            "batch_tokens": "auto",
            "transport": "object-store",
        },
        "catalog": {"source": "builtin", "archetypes": "all", "system_prompts": 5, "questions": 240, "samples": 1},
        "rollouts": {
            "source": "generate",
            "path": None,
            "max_new_tokens": 512,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 0,
            "seed": 0,
            "thinking": False,
        },
        "capture": {"layers": "all", "max_length": 2048},
        "store": {"url": "s", "dtype": "bf16-exact", "unit_rows": "auto", "client": "auto"},
        "judge": {"backend": "none", "path": None},
        "reduce": {
            "preset": "paper",
            "min_score": 3,
            "min_count": 10,
            "somewhat": True,
            "pca": "plain",
            "rank": 64,
            "rollout_pca": "incremental",
            "exact_layers": [],
            "device": "auto",
            "bootstrap": 200,
            "checkpoint_rows": "auto",
            "stop": None,
            "extra": None,
        },
        "limits": {"hours": None, "rows": None, "money": None, "gpu_hour_price": None},
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (3, 10, True)),
        ({"preset": "published-code"}, (3, 50, False)),
        ({"preset": "published-code", "min_count": 5, "somewhat": True}, (3, 5, True)),
    ],
)
def test_a_preset_fills_in_what_the_job_leaves_out(given: dict[str, Any], expected: tuple[int, int, bool]) -> None:
    reduce = parse_job(LEAST | {"reduce": given}).reduce
    assert (reduce.min_score, reduce.min_count, reduce.somewhat) == expected


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model": {}}, "model.id: is required"),
        ({"store": None}, "store: "),
        ({"modle": {"id": "m"}}, "modle: unknown key"),
        ({"shards": {"stagse": 2}}, "shards.stagse: unknown key"),
        ({"shards": {"stages": 0}}, "stages must be at least 1, or auto"),
        ({"shards": {"stages": "many"}}, "shards.stages: "),
        ({"shards": {"tensor_parallel": 0}}, "shards.tensor_parallel: "),
        ({"shards": {"gpus_per_shard": 0, "transport": "nccl"}}, "transport: nccl connects GPUs"),
        ({"shards": {"replicas": 0}}, "replicas must be at least 1, or auto"),
        ({"shards": {"gpus_per_shard": 2}}, "shards.gpus_per_shard: input should be less than or equal to 1"),
        ({"rollouts": {"source": "endpoint"}}, "rollouts.source: 'endpoint' is not available in this version"),
        ({"rollouts": {"source": "import"}}, "source: import needs a path"),
        ({"rollouts": {"path": "x"}}, "path belongs to source: import"),
        ({"rollouts": {"thinking": "perhaps"}}, "rollouts.thinking: "),
        ({"rollouts": {"top_p": 0}}, "rollouts.top_p: "),
        ({"rollouts": {"top_k": -1}}, "rollouts.top_k: "),
        ({"model": {"id": "m", "kind": "base"}}, "model.kind: base needs rollouts.source: import"),
        ({"model": {"id": "m", "trust_remote_code": True}}, "model.trust_remote_code: true is not available"),
        ({"judge": {"backend": "endpoint"}}, "judge.backend: 'endpoint' is not available"),
        ({"judge": {"backend": "scores"}}, "backend scores needs a path"),
        ({"judge": {"path": "x"}}, "path is set, but backend is none"),
        ({"reduce": {"preset": "publisht-code"}}, "reduce.preset: input should be 'paper' or 'published-code'"),
        ({"reduce": {"checkpoint_rows": 0}}, "reduce.checkpoint_rows: "),
        ({"reduce": {"stop": {"cosine": 1.5}}}, "reduce.stop.cosine: input should be less than 1"),
        ({"limits": {"money": 0}}, "limits.money: input should be greater than 0"),
        ({"limits": {"gpu_hour_price": -1}}, "limits.gpu_hour_price: input should be greater than 0"),
        ({"store": {"url": "memory://x"}}, "a memory: store lives in one process only"),
        ({"store": {"url": "s", "dtype": "float16"}}, "store.dtype: input should be 'bf16-exact', 'float32' or 'bfloat16'"),
        ({"store": {"url": "s", "client": "fsspec"}}, "client: fsspec needs an s3:// URL"),
        ({"store": {"url": "gs://b/s", "client": "fsspec"}}, "client: fsspec needs an s3:// URL"),
        ({"store": {"url": "fsspec+s3://b/s", "client": "obstore"}}, "begins with fsspec+"),
        ({"capture": {"layers": "some"}}, "capture.layers: "),
        ({"capture": {"layers": {"stride": 0}}}, "capture.layers"),
        ({"name": "no spaces"}, "name: "),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError) as refused:
        parse_job({**LEAST, **change})
    assert complaint in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("dtype", ["bf16-exact", "float32", "bfloat16"])
def test_every_number_format_of_the_store_is_served(dtype: str) -> None:
    assert parse_job({**LEAST, "store": {"url": "s", "dtype": dtype}}).store.dtype == dtype


def test_a_section_that_was_left_out_can_be_given_key_by_key() -> None:
    settings = ReduceConfig().model_dump(mode="json")
    assert settings["stop"] is None
    stop = reduce_config(settings, ["reduce.stop.cosine=0.99"]).stop
    assert stop is not None
    assert (stop.cosine, stop.patience) == (0.99, 3)
    with pytest.raises(InputError, match="bootstrap is 0"):
        reduce_config(settings, ["reduce.bootstrap=5"])


def test_overrides_replace_keys_and_values_are_yaml(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("model: {id: m}\nstore: {url: s}\n")
    job = load_job(file, ["shards.stages=2", "capture.layers=[1, 3]", "model.id=other", "catalog.archetypes=[bard]"])
    assert (job.shards.stages, job.capture.layers, job.model.id, job.catalog.archetypes) == (2, (1, 3), "other", ("bard",))


@pytest.mark.parametrize(
    ("text", "overrides", "complaint"),
    [
        ("model: {id: m", [], "not YAML"),
        ("name: 2024-13-45\n", [], "not YAML"),
        ("model: {id: m}\nstore: {url: s}\n", ["name=2024-13-45"], "the value is not YAML"),
        ("- a\n- b\n", [], "a job file is a YAML mapping"),
        ("", [], "a job file is a YAML mapping"),
        ("model: {id: m}\nstore: {url: s}\n", ["shards.stages"], "expected key=value"),
        ("model: {id: m}\nstore: {url: s}\nname: x\n", ["name.sub=1"], "name is not a section"),
        ("model: {id: m}\nstore: {url: s}\n", ["shards.stages=[1"], "the value is not YAML"),
    ],
)
def test_defects_of_the_file_are_said_in_one_line(tmp_path: Path, text: str, overrides: list[str], complaint: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=complaint) as refused:
        load_job(file, overrides)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("layers", "expected"), [("all", range(5)), ((3, 1), (3, 1)), ({"stride": 2}, (0, 2, 4))], ids=["all", "list", "stride"]
)
def test_layers_are_all_a_list_or_a_stride(layers: object, expected: object) -> None:
    job = parse_job({**LEAST, "capture": {"layers": layers}})
    assert list(job.capture.wanted_layers(5)) == list(expected)  # type: ignore[call-overload]


def test_a_base_model_takes_another_models_rollouts() -> None:
    job = parse_job({**LEAST, "model": {"id": "m", "kind": "base"}, "rollouts": {"source": "import", "path": "there"}})
    assert (job.model.kind, job.rollouts.path) == ("base", "there")


def test_the_fsspec_client_travels_with_the_url() -> None:
    job = parse_job({**LEAST, "store": {"url": "s3://b/s", "client": "fsspec"}})
    assert job.store.url == "fsspec+s3://b/s"
    assert parse_job(job.as_dict()) == job
    assert parse_job({**LEAST, "store": {"url": "fsspec+s3://b/s"}}).store.url == "fsspec+s3://b/s"


def test_a_job_survives_its_own_dump() -> None:
    job = parse_job(LEAST)
    assert Job.model_validate(job.as_dict()) == job
