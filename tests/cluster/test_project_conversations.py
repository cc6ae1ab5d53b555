"""Conversations read by a real model on a local Ray, and every turn of the Assistant on an axis."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from persona_ray.shards.source import model_location
from persona_ray.store.reader import open_store
from tests.test_cli_results import call, document

MODEL = "builtin:tiny-persona"
LAYER = 2


def conversation(question: int, *turns: str, system: str = "") -> dict[str, Any]:
    """A line of the published layout; `turns` of user and assistant, by turns."""
    messages = [{"role": "user" if place % 2 == 0 else "assistant", "content": text} for place, text in enumerate(turns)]
    opening = [{"role": "system", "content": system}] if system else []
    facts = {"system_prompt": system, "prompt_index": 0, "question_index": question, "question": turns[0]}
    return {**facts, "conversation": [*opening, *messages], "label": "pos"}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three turns of the Assistant, of which the second is empty; two behind a system message; and a conversation without an answer."""
    folder = tmp_path_factory.mktemp("chats")
    lines = (
        conversation(0, "How are you?", "I am here to help.", "And now?", "", "Then?", "The sea calls me."),
        conversation(1, "What is time?", "A river of stars.", "Is it?", "It is a plain number.", system="You are a bard."),
    )
    (folder / "therapy.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "mute.jsonl").write_text(json.dumps(conversation(0, "How are you?", "")))
    return folder


@pytest.fixture(scope="module")
def axis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = json.loads((Path(model_location(MODEL)) / "config.json").read_text())
    shape = (config["num_hidden_layers"], config["hidden_size"])
    file = tmp_path_factory.mktemp("axis") / "axis.safetensors"
    vectors = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    facts = {"layers": json.dumps(list(range(shape[0]))), "model_id": MODEL}
    save_file({"axis": vectors[0], "default_vector": vectors[1]}, file, metadata=facts)
    return file


@pytest.fixture(scope="module")
def by_hand(axis: Path) -> Callable[[Any], float]:
    """A rollout's projection by plain transformers."""
    from safetensors.numpy import load_file

    model = AutoModelForCausalLM.from_pretrained(model_location(MODEL), dtype=torch.float32)
    unit_D = load_file(axis)["axis"][LAYER].astype(np.float64)
    unit_D /= np.linalg.norm(unit_D)

    def project(rollout: Any) -> float:
        with torch.no_grad():
            states = model(torch.tensor(rollout.token_ids[None].astype(np.int64)), output_hidden_states=True).hidden_states
        answer_TD = states[LAYER + 1][0, rollout.response_start : rollout.response_end].double().numpy()
        return float(answer_TD.mean(axis=0) @ unit_D)

    return project


def test_every_turn_is_a_row_and_a_kept_store_is_read_again(
    capsys: pytest.CaptureFixture[str], chats: Path, axis: Path, by_hand: Callable[[Any], float], tmp_path: Path
) -> None:
    keep, out = tmp_path / "store", tmp_path / "drift.parquet"
    reads = ("--model", MODEL, "--cpu", "--set", "model.dtype=float32", "--store", keep, "--axis", axis, "--layers", str(LAYER))
    command = ("project", "--conversations", chats, *reads)
    found = document(capsys, *command, "--out", out)
    assert found["turns"]["asked"] == 6
    assert found["turns"]["stored"] == found["rows"] == 4
    assert sum(found["turns"]["reasons"].values()) == 2
    answers = found["layers"][0]["answers"]
    assert [(answer["answer"], answer["rows"]) for answer in answers] == [(1, 2), (2, 1), (3, 1)], "the refused one keeps its number"
    assert [line["archetype"] for line in found["layers"][0]["archetypes"]] == ["therapy"]

    store = open_store(str(keep))
    expected = {
        (rollout.key.question, rollout.key.turn): by_hand(rollout)
        for unit in store.rollouts(store.units())
        for rollout in unit
        if rollout.refusal is None
    }
    assert sorted(expected) == [(0, 1), (0, 5), (1, 2), (1, 4)]
    lines = {(line["question"], line["turn"]): line["projection"] for line in pq.read_table(out).to_pylist()}
    assert lines == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert (store.layers, store.latest_reduced()) == ((LAYER,), None)

    assert document(capsys, *command) == found | {"out": None}
    code, printed, err = call(capsys, *command)
    assert code == 0, err
    assert "By the Assistant's turn" in printed
    assert f"store    {keep}" in printed
    assert "refused  2 turns" in printed
    code, printed, err = call(capsys, "project", "--conversations", chats / "mute.jsonl", *reads)
    assert (code, printed, "not one of 1 rows can be used: 1 x" in err) == (1, "", True)


def test_wrong_input_is_known_before_anything_is_begun(
    capsys: pytest.CaptureFixture[str], chats: Path, axis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passing, narrow, keep = tmp_path / "passing", tmp_path / "narrow.safetensors", tmp_path / "store"
    passing.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(passing))
    save_file({"axis": np.ones((4, 6), np.float32)}, narrow)
    for arguments, complaint in (
        (("--conversations", chats, "--axis", narrow), "has hidden size 6, and builtin:tiny-persona has"),
        (("--conversations", chats, "--axis", axis, "--layers", "99"), "there is no layer 99"),
        (("--conversations", tmp_path, "--axis", axis), "holds no {archetype}.jsonl file"),
        (("--conversations", chats, "--axis", axis, "--set", "model.size=7"), "model.size: unknown key"),
    ):
        for where in ((), ("--store", keep)):
            code, printed, err = call(capsys, "project", *arguments, "--model", MODEL, "--cpu", *where)
            assert (code, printed, complaint in err) == (2, "", True), err
    assert (keep.exists(), list(passing.glob("persona-ray-*"))) == (False, [])
