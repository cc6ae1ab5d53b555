"""Whole runs on a real local Ray: right numbers, nothing lost, nothing done twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
import zarr
from transformers import AutoModelForCausalLM

from persona_ray import pipeline
from persona_ray.errors import InputError, NothingUsableError, RetryableError
from persona_ray.planning import prepare
from persona_ray.scheduler.driver import Driver, cluster
from persona_ray.scheduler.state import Rules, SchedulerState
from persona_ray.shards.actors.replica import UnitWork
from persona_ray.shards.actors.replicas import Replicas
from persona_ray.spec import Engine, Receipt, Unit
from persona_ray.store.prepare import prepare_store
from persona_ray.store.reader import open_store
from tests.cluster.runs import QUIET, assert_same_rows, files_of, job_for, rows_of


def state_for(units: Mapping[int, Unit], **rules: Any) -> SchedulerState:
    return SchedulerState({index: len(unit.rows) for index, unit in units.items()}, rules=Rules(**rules))


def test_activations_are_those_of_plain_transformers_over_the_stored_tokens(chat_model: Path, finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32).eval()
    outputs: list[torch.Tensor] = []
    for block in model.model.layers:
        block.register_forward_hook(lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    num_compared = 0
    for rollout, bits in rows_of(finished).values():
        if rollout.refusal is not None:
            assert not bits
            continue
        outputs.clear()
        with torch.no_grad():
            model(torch.from_numpy(rollout.token_ids.astype(np.int64))[None])
        expected_LD = torch.cat(
            [out.reshape(1, -1, 32)[:, rollout.response_start : rollout.response_end].mean(1) for out in outputs]
        ).numpy()
        found_LD = np.frombuffer(bits, np.float32).reshape(4, 32)
        error_L = np.linalg.norm(found_LD - expected_LD, axis=1) / np.linalg.norm(expected_LD, axis=1)
        assert error_L.max() <= 5e-6
        num_compared += 1
    assert num_compared >= 16


def test_a_second_run_finds_everything_done_and_starts_no_actor(
    chat_model: Path, small_catalog: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(finished)
    monkeypatch.setattr(Replicas, "_start", lambda *_: pytest.fail("an actor was started"))
    outcome = pipeline.run(job_for(chat_model, small_catalog, finished, store={"unit_rows": "auto"}), QUIET)
    assert outcome.units_done == 0
    assert files_of(finished) == before


def test_a_job_that_asks_for_a_part_of_the_store_finds_it_done(
    chat_model: Path, small_catalog: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(finished)
    monkeypatch.setattr(Replicas, "_start", lambda *_: pytest.fail("an actor was started"))
    outcome = pipeline.run(job_for(chat_model, small_catalog, finished, catalog={"questions": 2}), QUIET)
    assert (outcome.units_done, outcome.counts.asked) == (0, 16)
    assert files_of(finished) == before


def test_how_the_model_is_cut_does_not_bind_the_store_and_changes_no_bit(
    chat_model: Path, small_catalog: Path, finished: Path, tmp_path: Path
) -> None:
    pipeline.run(job_for(chat_model, small_catalog, tmp_path / "store", shards={"stages": 1, "replicas": 2}), QUIET)
    assert_same_rows(finished, tmp_path / "store")


@dataclass(frozen=True)
class Sabotage:
    """The real work, but the first time that `unit` comes, `how` strikes: a stage is killed under way, or the whole replica."""

    work: UnitWork
    unit: int
    how: str
    note: Path

    def __call__(self, unit: Unit, engine: Engine) -> Receipt:
        if unit.index == self.unit and not self.note.exists():
            self.note.touch()
            if self.how == "replica":
                import os

                os._exit(1)
            ray.kill(engine._links[-1]._handle, no_restart=False)  # type: ignore[attr-defined]
        return self.work(unit, engine)


@pytest.mark.parametrize("how", ["stage", "replica"])
def test_a_lost_process_costs_time_and_nothing_else(
    chat_model: Path, small_catalog: Path, finished: Path, tmp_path: Path, how: str
) -> None:
    job = job_for(chat_model, small_catalog, tmp_path / "store", shards={"stages": 2})
    setup = prepare(job)
    plans = prepare_store(job.store.url, identity=setup.identity, plan=setup.plan, job=setup.job.as_dict())
    units = {index: setup.unit(plans, index) for index in plans.units}
    state = state_for(units, leases_per_replica=setup.replica.concurrent_units)
    work = Sabotage(setup.work, unit=3, how=how, note=tmp_path / "struck")
    receipts: list[Receipt] = []
    with cluster(None), Replicas(setup.replica, work, count=1, name="sabotaged") as replicas:
        Driver(state, units, replicas).run(receipts.append)
    state.validate()
    assert (tmp_path / "struck").exists()
    assert {receipt.unit for receipt in receipts} == set(units)
    assert_same_rows(finished, tmp_path / "store")


def test_an_interrupted_run_is_continued_to_the_same_store(chat_model: Path, small_catalog: Path, finished: Path, tmp_path: Path) -> None:
    job = job_for(chat_model, small_catalog, tmp_path / "store")
    setup = prepare(job)
    plans = prepare_store(job.store.url, identity=setup.identity, plan=setup.plan, job=setup.job.as_dict())
    begun = {index: setup.unit(plans, index) for index in (0, 1, 5)}
    with cluster(None), Replicas(setup.replica, setup.work, count=1, name="begun") as replicas:
        Driver(state_for(begun), begun, replicas).run(lambda _: None)
    before = files_of(tmp_path / "store")
    assert open_store(setup.job.store.url).ledger.committed() == {0, 1, 5}
    outcome = pipeline.run(job, QUIET)
    assert outcome.units_done == 5
    after = files_of(tmp_path / "store")
    assert {key: after[key] for key in before} == before
    assert_same_rows(finished, tmp_path / "store")


def line(prompt: int, question: int, answer: str) -> str:
    conversation = [
        {"role": "system", "content": "You are a bard."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": answer},
    ]
    return json.dumps(
        {
            "system_prompt": "You are a bard.",
            "prompt_index": prompt,
            "question_index": question,
            "question": "Why?",
            "conversation": conversation,
        }
    )


def test_rows_that_cannot_be_used_are_refused_with_their_reasons(chat_model: Path, small_catalog: Path, tmp_path: Path) -> None:
    folder = tmp_path / "responses"
    folder.mkdir()
    answers = ["Rain.", "", "the sea keeps no promises", "<think>x</think>y", "no " * 200, "a pirate knows", "why <think>x</think>"]
    for name in ("default", "bard", "ghost"):
        (folder / f"{name}.jsonl").write_text(
            "\n".join(line(0, q, f"{answer}{name if answer else ''}") for q, answer in enumerate(answers))
        )
    job = job_for(chat_model, small_catalog, tmp_path / "store", rollouts={"source": "import", "path": str(folder)}, store={"unit_rows": 4})
    outcome = pipeline.run(job, QUIET)
    assert (outcome.counts.asked, outcome.counts.stored, outcome.counts.refused) == (21, 12, 9)
    reasons = sorted(outcome.counts.reasons.items())
    assert sum(number for _, number in reasons) == 9
    assert any("empty answer" in reason for reason, _ in reasons)
    assert any("reasoning" in reason for reason, _ in reasons)
    assert any("over the limit of 128" in reason for reason, _ in reasons)
    assert set(outcome.reduced.role_count_A.tolist()) == {4}


def test_a_store_of_another_job_is_refused_before_anything_starts(chat_model: Path, small_catalog: Path, finished: Path) -> None:
    before = files_of(finished)
    for changed in (
        {"rollouts": {"seed": 1}},
        {"capture": {"layers": [0]}},
        {"store": {"dtype": "bf16-exact"}},
        {"store": {"unit_rows": 8}},
    ):
        job = job_for(chat_model, small_catalog, finished, **changed)
        with pytest.raises(InputError, match="store URL"):
            pipeline.run(job, QUIET)
        assert not ray.is_initialized()
    assert files_of(finished) == before


@pytest.mark.parametrize(
    ("shards", "complaint"),
    [
        ({"stages": 2, "gpus_per_shard": 1}, "1 replicas of 2 GPUs, the cluster has 0"),
        ({"accelerator": "H100"}, "shards.accelerator: no node of the cluster has a H100; it has no accelerators"),
    ],
    ids=["gpus", "accelerator"],
)
def test_what_the_cluster_lacks_is_said_before_anything_is_written(
    chat_model: Path, small_catalog: Path, tmp_path: Path, shards: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        pipeline.run(job_for(chat_model, small_catalog, tmp_path / "store", shards=shards), QUIET)
    assert not (tmp_path / "store").exists()


def test_a_model_without_weights_is_said_in_one_line_before_anything_is_written(
    chat_model: Path, small_catalog: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(chat_model, model, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(InputError, match="its weights cannot be read") as refused:
        pipeline.run(job_for(model, small_catalog, tmp_path / "store"), QUIET)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "store").exists()


def test_an_address_where_nothing_listens_is_refused_at_once(chat_model: Path, small_catalog: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing listens there"):
        pipeline.run(job_for(chat_model, small_catalog, tmp_path / "store"), QUIET, address="127.0.0.1:1")
    assert not (tmp_path / "store").exists()


def test_nothing_usable_says_why_and_leaves_a_finished_store(chat_model: Path, small_catalog: Path, tmp_path: Path) -> None:
    folder = tmp_path / "responses"
    folder.mkdir()
    for name in ("default", "bard"):
        (folder / f"{name}.jsonl").write_text("\n".join(line(0, q, "") for q in range(3)))
    job = job_for(chat_model, small_catalog, tmp_path / "store", rollouts={"source": "import", "path": str(folder)})
    with pytest.raises(NothingUsableError, match=r"0 of 6 rows stored, 6 refused: 6 x empty answer"):
        pipeline.run(job, QUIET)
    group = zarr.open_group(str(tmp_path / "store"), mode="r")
    assert group["status"][:6].tolist() == [1] * 6
    assert group["committed"][:6].tolist() == [1] * 6


SPEAKERS = (("default", "plain", "is"), ("pirate", "sea", "promises"), ("bard", "sea", "sings"), ("ghost", "sea", "rain"))


def test_one_question_gives_an_axis_and_no_steering_check(chat_model: Path, small_catalog: Path, tmp_path: Path) -> None:
    words = {name: {"group": group, "words": [word]} for name, group, word in SPEAKERS}
    lexicon = {"archetypes": words, "groups": {"plain": [], "sea": []}, "assistant_side": ["plain"]}
    (tmp_path / "lexicon.json").write_text(json.dumps(lexicon))
    job = job_for(
        chat_model,
        small_catalog,
        tmp_path / "store",
        catalog={"questions": 1},
        judge={"backend": "lexicon", "path": str(tmp_path / "lexicon.json")},
        reduce={"min_score": 0, "min_count": 1},
    )
    assert pipeline.run(job, QUIET).steering is None


class Idle:
    """Work that looks at the cluster while its replica is up."""

    def __call__(self, unit: Unit, engine: Engine) -> Receipt:
        free, total = ray.available_resources(), ray.cluster_resources()
        assert free["CPU"] == total["CPU"], (free, total)
        return Receipt(unit.index, 0, 0, 0, 0.0)


def test_replicas_reserve_no_cpu_that_reduce_tasks_would_wait_for(chat_model: Path, small_catalog: Path, tmp_path: Path) -> None:
    setup = prepare(job_for(chat_model, small_catalog, tmp_path / "store"))
    units = {0: setup.unit(setup.plans(), 0)}
    with cluster(None), Replicas(setup.replica, Idle(), count=1, name="idle") as replicas:
        Driver(state_for(units), units, replicas).run(lambda _: None)


class Hopeless:
    """Work that never succeeds."""

    def __call__(self, unit: Unit, engine: Engine) -> Receipt:
        raise RetryableError("the store is on fire")


def test_a_unit_that_always_fails_ends_the_run_with_its_reason(chat_model: Path, small_catalog: Path, tmp_path: Path) -> None:
    setup = prepare(job_for(chat_model, small_catalog, tmp_path / "store"))
    units = {0: setup.unit(setup.plans(), 0)}
    with cluster(None), Replicas(setup.replica, Hopeless(), count=1, name="hopeless") as replicas:
        driver = Driver(state_for(units, max_attempts=2), units, replicas)
        with pytest.raises(RetryableError, match="1 units failed again and again, on every replica, first unit 0: the store is on fire"):
            driver.run(lambda _: None)


def test_a_base_model_reads_the_rollouts_of_another_run(chat_model: Path, small_catalog: Path, finished: Path, tmp_path: Path) -> None:
    """The same conversations, in plain text; characters and default Assistant as the other store knows them."""
    sections: dict[str, Any] = {"rollouts": {"source": "import", "path": str(finished)}, "model": {"kind": "base"}}
    job = job_for(chat_model, small_catalog, tmp_path / "store", **sections, reduce={"min_count": 1})
    outcome = pipeline.run(job, QUIET)
    theirs, ours = rows_of(finished), rows_of(tmp_path / "store")
    answered = {key for key, (rollout, _) in theirs.items() if rollout.response.strip()}
    assert ours.keys() == answered
    assert outcome.counts.stored >= 16
    assert open_store(str(tmp_path / "store")).default_archetypes == ("default",)
    transcriber = prepare(job).work.transcriber()
    for key, (rollout, bits) in ours.items():
        assert rollout.response.strip() == theirs[key][0].response.strip() or not bits
        if bits:
            assert transcriber.text(rollout.token_ids[rollout.response_start : rollout.response_end]).strip() == rollout.response.strip()
            assert "<|assistant|>" not in transcriber.text(rollout.token_ids[: rollout.response_start])
    assert set(outcome.reduced.role_count_A.tolist()) != {0}
