"""Every job file goes through the plan, with its model's published numbers: the rows are those of the paper, and the cut fits."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from persona_ray.config import Job, load_job
from persona_ray.costs.estimate import estimate
from persona_ray.errors import InputError
from persona_ray.planning import Setup, prepare
from persona_ray.shards.size import model_size
from tests.cluster_files.files import JOBS
from tests.cluster_files.published import PUBLISHED, write

BUILTIN = {"quickstart"}
"""Its model is here, whole; tests/cluster runs it."""
NAMES = sorted(path.stem for path in JOBS.glob("*.yaml") if path.stem not in BUILTIN)
PAPER = ("gemma-2-27b", "qwen3-32b", "llama-3.3-70b")
BASE_OF = {"gemma-2-27b-base": "gemma-2-27b", "llama-3.1-70b-base": "llama-3.3-70b"}
SMALLEST = {"gemma-2-2b": "L4", "llama-3.2-3b": "L4", "qwen3-4b": "L4", "qwen3-8b": "A100-40G"}
"""Job for any one GPU -> the smallest that its comment promises."""


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hub name -> folder."""
    root = tmp_path_factory.mktemp("models")
    return {name: write(name, root / name.replace("/", "--")) for name in PUBLISHED}


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a base model is shown here: two characters, three questions."""
    folder = tmp_path_factory.mktemp("conversations")
    for name in ("default", "pirate"):
        rows = [
            {
                "system_prompt": "Be.",
                "prompt_index": 0,
                "question_index": number,
                "question": "Why?",
                "conversation": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "For the sea."}],
                "label": "pos",
            }
            for number in range(3)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def _here(name: str, folders: dict[str, Path], conversations: Path, tmp_path: Path, *overrides: str) -> Job:
    """The job with its model, its store and what it reads on this machine."""
    job = load_job(JOBS / f"{name}.yaml")
    settings = [f"model.id={folders[job.model.id]}", f"store.url={tmp_path / 'store'}", *overrides]
    if job.rollouts.path is not None:
        settings.append(f"rollouts.path={conversations}")
    return load_job(JOBS / f"{name}.yaml", settings)


def test_all_jobs_are_known_here() -> None:
    assert set(NAMES) == {*PAPER, *BASE_OF, *SMALLEST}
    assert {load_job(JOBS / f"{name}.yaml").model.id for name in NAMES} == set(PUBLISHED)


@pytest.mark.parametrize("model_id", PUBLISHED)
def test_the_configs_here_have_as_many_parameters_as_the_models(model_id: str) -> None:
    assert model_size(PUBLISHED[model_id].config()).parameters == PUBLISHED[model_id].parameters


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_is_whole_and_its_cut_fits(name: str, model_folders: dict[str, Path], conversations: Path, tmp_path: Path) -> None:
    accelerator = [f"shards.accelerator={SMALLEST[name]}"] if name in SMALLEST else []
    setup = prepare(_here(name, model_folders, conversations, tmp_path, *accelerator))
    facts = setup.facts()
    assert facts["rollouts"] == (6 if name in BASE_OF else 276 * 5 * 240)
    assert facts["archetypes"] == (2 if name in BASE_OF else 276)
    assert facts["layers"] == setup.cut.ranges[-1][1] == PUBLISHED[load_job(JOBS / f"{name}.yaml").model.id].config().num_hidden_layers
    assert facts["units"] == facts["units_to_do"] == -(-facts["rollouts"] // facts["unit_rows"])
    _assert_fits(setup)
    _assert_costs(name, setup)


RAW_GB = {"gemma-2-27b": 140, "qwen3-32b": 217, "llama-3.3-70b": 434}
"""The design's sizes: every layer of every row in bfloat16, before compression."""
CAPTURE = {"gemma-2-27b": (0.9e19, 6.5), "qwen3-32b": (1.1e19, 7.8), "llama-3.3-70b": (2.4e19, 17)}
"""Job -> FLOPs of capturing 172 million tokens, and H100-hours for them at 400 TFLOP/s; worked out apart from this code, two digits."""


def _assert_costs(name: str, setup: Setup) -> None:
    """Of the paper's three models: as others have worked them out. Of all: known, and decoding costs most."""
    # This tokenizer has no words: the real ones take about 85 tokens for a prompt, which with answers of 435 makes 172 million.
    expected = estimate(setup, assume=["prompt_tokens=85", "padding=0"])
    hours = expected.gpu_hours(expected.rows(setup.units(expected.plans)))
    assert hours["generation"] is not None
    assert hours["capture"] is not None
    assert expected.assumptions.value("gpu_hour")
    assert hours["generation"] == 0 if name in BASE_OF else hours["generation"] > hours["capture"] > 0
    if name in PAPER:
        whole, (flops, h100_hours) = expected.facts()["whole"], CAPTURE[name]
        assert (whole["rows"], whole["units"]) == (len(setup.rows), setup.facts()["units"])
        assert whole["tokens"] == pytest.approx(172e6, rel=0.01)
        assert whole["bytes"] == pytest.approx(0.85 * RAW_GB[name] * 1e9, rel=0.01)  # a text is 1 % of its activations, at most
        assert whole["prefill_flops"] == pytest.approx(flops, rel=0.05)
        assert hours["capture"] == pytest.approx(h100_hours, rel=0.08)  # stages of whole blocks are not quite even
        assert whole["requests"]["put"] == whole["objects"]["rollouts"] > 7 * whole["units"]


def _assert_fits(setup: Setup) -> None:
    """Every stage has room to spare on the accelerator."""
    stages = setup.cut.stages
    assert all(stage.left_bytes is not None and stage.left_bytes > 0 for stage in stages)
    assert setup.replica.tensor_parallel == 1  # rows that agree to the bit
    assert len(stages) == setup.job.shards.stages


@pytest.mark.parametrize("name", [*PAPER, *BASE_OF])
def test_the_stages_are_the_fewest_or_the_file_says_why_not(
    name: str, model_folders: dict[str, Path], conversations: Path, tmp_path: Path
) -> None:
    fewest = prepare(_here(name, model_folders, conversations, tmp_path, "shards.stages=auto", "catalog.questions=1"))
    wanted = load_job(JOBS / f"{name}.yaml").shards
    assert wanted.accelerator == "H100"
    if name == "llama-3.3-70b":
        roomy = prepare(_here(name, model_folders, conversations, tmp_path, "catalog.questions=1"))
        assert (len(fewest.cut.stages), wanted.stages) == (3, 4)
        assert roomy.replica.decode_tokens > 1.5 * fewest.replica.decode_tokens
    else:
        assert len(fewest.cut.stages) == wanted.stages


@pytest.mark.parametrize("name", NAMES)
def test_the_names_agree(name: str) -> None:
    job = load_job(JOBS / f"{name}.yaml")
    assert job.name == name
    assert name in job.store.url
    assert job.model.revision is None
    assert (job.model.kind == "base") == (name in BASE_OF)


@pytest.mark.parametrize(("base", "instruct"), BASE_OF.items())
def test_a_base_model_reads_what_its_instruct_model_wrote_and_measures_alike(base: str, instruct: str) -> None:
    reads, wrote = load_job(JOBS / f"{base}.yaml"), load_job(JOBS / f"{instruct}.yaml")
    assert reads.rollouts.path == wrote.store.url
    assert (reads.capture, reads.reduce, reads.store.dtype) == (wrote.capture, wrote.reduce, wrote.store.dtype)
    assert reads.shards.batch_tokens == wrote.shards.batch_tokens


@pytest.mark.parametrize("name", PAPER)
def test_the_sizes_that_a_file_names_are_those_of_its_rows(name: str) -> None:
    """Every layer of every row in bfloat16, and 0.855 of that after compression (README: 0.850 and 0.852)."""
    text = (JOBS / f"{name}.yaml").read_text(encoding="utf-8")
    named = re.search(r"at every layer: (\d+) GB, of which a store takes (\d+)\.", text)
    config = PUBLISHED[load_job(JOBS / f"{name}.yaml").model.id].config()
    raw_gb = 276 * 5 * 240 * config.num_hidden_layers * config.hidden_size * 2 / 1e9
    assert named is not None
    assert int(named[1]) == round(raw_gb)
    assert abs(int(named[2]) - 0.855 * raw_gb) <= 0.01 * raw_gb


def test_what_does_not_fit_is_refused(model_folders: dict[str, Path], conversations: Path, tmp_path: Path) -> None:
    """The assertion above can fail: half of the GPUs are too few."""
    with pytest.raises(InputError, match="do not fit"):
        prepare(_here("llama-3.3-70b", model_folders, conversations, tmp_path, "shards.stages=2", "catalog.questions=1"))
