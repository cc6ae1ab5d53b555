from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from persona_ray.errors import InputError
from persona_ray.judge.scores import ScoresJudge
from persona_ray.spec import NOT_SCORED, FinishReason, Rollout, RowKey


def rollout(key: RowKey) -> Rollout:
    return Rollout(0, key, "", "q", "answer", np.zeros(2, np.int32), 1, 2, FinishReason.IMPORTED)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bard.json").write_text(json.dumps({"pos_p0_q0": 3, "pos_p0_q1": 0, "pos_p12_q3": 2, "neg_p0_q0": 1}))
    (tmp_path / "alien.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("key", "score", "said"),
    [
        (RowKey("bard", 0, 0), 3, "3"),
        (RowKey("bard", 0, 0, turn=4), 3, "3"),
        (RowKey("bard", 0, 1), 0, "0"),
        (RowKey("bard", 12, 3), 2, "2"),
        (RowKey("bard", 1, 23), NOT_SCORED, "bard.json has no pos_p1_q23"),
        (RowKey("bard", 0, 0, sample=1), NOT_SCORED, "sample 1"),
        (RowKey("alien", 0, 0), NOT_SCORED, "alien.json has no pos_p0_q0"),
        (RowKey("default", 0, 0), NOT_SCORED, "no default.json"),
    ],
)
def test_scores_are_looked_up(folder: Path, key: RowKey, score: int, said: str) -> None:
    (judgement,) = ScoresJudge(folder).judge([rollout(key)])
    assert judgement.score == score
    assert said in judgement.raw


def test_one_judgement_each_in_order(folder: Path) -> None:
    keys = [RowKey("bard", 0, 1), RowKey("alien", 0, 0), RowKey("bard", 0, 0)]
    assert [judgement.score for judgement in ScoresJudge(folder).judge([rollout(key) for key in keys])] == [0, NOT_SCORED, 3]


def test_the_name_changes_with_any_score(folder: Path) -> None:
    before = ScoresJudge(folder).name
    assert ScoresJudge(folder).name == before
    (folder / "alien.json").write_text('{"pos_p0_q0": 1}')
    assert ScoresJudge(folder).name != before
    assert before.startswith("scores-")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("[3]", "is a list"),
        ('{"pos_p0_q0": 4}', "pos_p0_q0"),
        ('{"pos_p0_q0": -1}', "pos_p0_q0"),
        ('{"pos_p0_q0": "3"}', 'this is "3"'),
        ('{"pos_p0_q0": 2.5}', "2.5"),
        ('{"pos_p0_q0": true}', "true"),
        ('{"pos_p0_q0": null}', "null"),
        ('{"pos_p0_q0": 1, "pos_p0_q0": 3}', "pos_p0_q0 is there twice"),
    ],
)
def test_a_bad_file_is_named_with_its_key(folder: Path, text: str, said: str) -> None:
    (folder / "alien.json").write_text(text)
    with pytest.raises(InputError) as error:
        ScoresJudge(folder)
    assert "alien.json" in str(error.value)
    assert said in str(error.value)


def test_a_file_that_is_not_text_is_named(folder: Path) -> None:
    (folder / "alien.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"alien\.json"):
        ScoresJudge(folder)


def test_no_folder_and_no_files_are_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent is no folder"):
        ScoresJudge(tmp_path / "absent")
    with pytest.raises(InputError, match=r"holds no \.json file"):
        ScoresJudge(tmp_path)
