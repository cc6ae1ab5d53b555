"""Reading the published layout, and saying where it is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from persona_ray.errors import InputError
from persona_ray.rollouts.importing import read_conversations, rollouts_as_conversations
from persona_ray.rollouts.wanted import rows_to_import
from persona_ray.spec import FinishReason, Rollout, RowKey

LINE = {
    "system_prompt": "You are a bard.",
    "prompt_index": 0,
    "question_index": 3,
    "question": "Why?",
    "conversation": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}],
    "label": "pos",
}


def write(folder: Path, name: str, *lines: object) -> None:
    (folder / f"{name}.jsonl").write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))


def test_lines_become_conversations_and_repetitions_become_samples(tmp_path: Path) -> None:
    write(tmp_path, "bard", LINE, LINE, {**LINE, "question_index": 4}, "\n")
    found = read_conversations(tmp_path)
    assert [(c.question_index, c.sample) for c in found["bard"]] == [(3, 0), (3, 1), (4, 0)]
    assert [message.content for message in found["bard"][0].messages] == ["Why?", "Because."]


def test_one_file_is_read_alone(tmp_path: Path) -> None:
    write(tmp_path, "bard", LINE)
    write(tmp_path, "sage", LINE)
    assert list(read_conversations(tmp_path / "sage.jsonl")) == ["sage"]
    with pytest.raises(InputError, match=r"holds no \{archetype\}\.jsonl file"):
        read_conversations(tmp_path / "none.jsonl")


def test_line_separators_inside_a_text_do_not_cut_it(tmp_path: Path) -> None:
    text = "first\u2028second\x0bthird"
    line = {**LINE, "conversation": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": text}]}
    (tmp_path / "bard.jsonl").write_text(json.dumps(line, ensure_ascii=False), encoding="utf-8")
    assert read_conversations(tmp_path)["bard"][0].messages[1].content == text


def test_the_digest_of_a_row_is_of_its_conversation(tmp_path: Path) -> None:
    def digests(line: dict[str, Any]) -> list[str]:
        write(tmp_path, "bard", line)
        return [row.text_digest for row in rows_to_import(read_conversations(tmp_path))]

    before = digests(LINE)
    assert digests(dict(reversed(LINE.items()))) == before
    turns = [*LINE["conversation"][:-1], {**LINE["conversation"][-1], "content": "Something else."}]
    assert digests({**LINE, "conversation": turns}) != before


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (["{"], r"bard\.jsonl, line 1: not JSON"),
        ([LINE, {key: value for key, value in LINE.items() if key != "question"}], r"bard\.jsonl, line 2: question: field required"),
        ([{**LINE, "conversation": [{"role": "user"}]}], r"line 1: conversation\.0\.content: field required"),
        ([{**LINE, "question_index": 3_000_000_000}], "line 1: question_index: input should be less than"),
        ([{**LINE, "prompt_index": -1}], "line 1: prompt_index: input should be greater than or equal to 0"),
        ([json.dumps({**LINE, "question": "\ud800"})], r"bard\.jsonl, line 1: "),
        (["\n"], "holds no conversation"),
        ([{**LINE, "conversation": [{"role": "user", "content": "Why?"}]}], "no assistant turn"),
    ],
)
def test_defects_name_file_and_line(tmp_path: Path, lines: list[object], complaint: str) -> None:
    write(tmp_path, "bard", *lines)
    with pytest.raises(InputError, match=complaint):
        read_conversations(tmp_path)


def test_a_folder_without_conversations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no \{archetype\}\.jsonl"):
        read_conversations(tmp_path)
    with pytest.raises(InputError, match="holds no"):
        read_conversations(tmp_path / "missing")


def rollout(key: RowKey, response: str, *, system_prompt: str = "You are a bard.", refusal: str | None = None) -> Rollout:
    ids = np.arange(9, dtype=np.int32)
    return Rollout(0, key, system_prompt, "Why?", response, ids, 4, 6, FinishReason.STOP, refusal, "Let me think.")


def test_another_runs_rollouts_become_the_rows_they_were() -> None:
    keys = [RowKey("bard", 1, 3, 0, 2), RowKey("bard", 0, 3, 1, 2), RowKey("angel", 0, 3, 0, 1)]
    rollouts = [rollout(keys[0], "A."), rollout(keys[1], "B."), rollout(keys[2], "C.", system_prompt="")]
    taken = rollouts_as_conversations(rollouts)
    assert taken.left_out == {}
    rows = rows_to_import(taken.conversations)
    assert sorted(row.key for row in rows) == sorted(keys)
    said = {row.key: [(message.role, message.content) for message in row.conversation] for row in rows}
    assert said[keys[0]] == [("system", "You are a bard."), ("user", "Why?"), ("assistant", "A.")]
    assert said[keys[2]] == [("user", "Why?"), ("assistant", "C.")]
    assert {row.key: row.system_prompt for row in rows} == {keys[0]: "You are a bard.", keys[1]: "You are a bard.", keys[2]: ""}


def test_the_order_in_which_units_are_read_does_not_matter() -> None:
    rollouts = [rollout(RowKey(name, p, q, 0, 2), f"{name}{p}{q}") for name in ("bard", "angel") for p in range(2) for q in range(3)]
    taken, reversed_ = (rollouts_as_conversations(order).conversations for order in (rollouts, rollouts[::-1]))
    assert [row.text_digest for row in rows_to_import(taken)] == [row.text_digest for row in rows_to_import(reversed_)]
    assert list(taken) == list(reversed_)


def test_what_is_left_out_is_counted() -> None:
    rollouts = [
        rollout(RowKey("bard", 0, 0, 0, 2), "Too long for them.", refusal="conversation of 3000 tokens, over the limit of 2048"),
        rollout(RowKey("bard", 0, 0, 0, 4), "A second answer."),
        rollout(RowKey("bard", 0, 1, 0, 2), " \n", refusal="empty answer"),
        rollout(RowKey("bard", 0, 1, 0, 4), "After an empty one."),
        rollout(RowKey("bard", 0, 2, 0, 4), "Of a conversation that begins with another answer."),
        rollout(RowKey("bard", 0, 3, 0, 2), "With a system message that is not recorded.", system_prompt=""),
    ]
    taken = rollouts_as_conversations(rollouts)
    assert [line.turns[-1].content for line in taken.conversations["bard"]] == ["Too long for them."]
    assert taken.left_out == {"a later turn: a rollout does not hold the turns before it": 4, "no answer": 1}


def test_a_run_without_an_answer_is_refused() -> None:
    with pytest.raises(InputError, match="none of the 1 rollouts of that run has an answer"):
        rollouts_as_conversations([rollout(RowKey("bard", 0, 0, 0, 2), "")])
