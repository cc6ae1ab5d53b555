"""Reading the published layout, and saying where it is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from persona_ray.errors import InputError
from persona_ray.rollouts.importing import conversations_digest, read_conversations

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


def test_line_separators_inside_a_text_do_not_cut_it(tmp_path: Path) -> None:
    text = "first\u2028second\x0bthird"
    line = {**LINE, "conversation": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": text}]}
    (tmp_path / "bard.jsonl").write_text(json.dumps(line, ensure_ascii=False), encoding="utf-8")
    assert read_conversations(tmp_path)["bard"][0].messages[1].content == text


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    write(tmp_path, "bard", LINE)
    before = conversations_digest(read_conversations(tmp_path))
    write(tmp_path, "bard", dict(reversed(LINE.items())))
    assert conversations_digest(read_conversations(tmp_path)) == before
    write(tmp_path, "bard", {**LINE, "question": "How?"})
    assert conversations_digest(read_conversations(tmp_path)) != before


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
