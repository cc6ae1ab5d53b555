from __future__ import annotations

import json
from pathlib import Path

import pytest

from persona_ray.config import JudgeConfig
from persona_ray.errors import InputError
from persona_ray.judge.backends import open_judge
from persona_ray.judge.lexicon import LexiconJudge
from persona_ray.judge.scores import ScoresJudge


def lexicon_file(path: Path, word: str) -> Path:
    content = {
        "archetypes": {"default": {"group": "assistant", "words": [word]}},
        "groups": {"assistant": []},
        "assistant_side": ["assistant"],
    }
    path.write_text(json.dumps(content))
    return path


def test_no_judge() -> None:
    assert open_judge(JudgeConfig(backend="none")) is None


def test_scores(tmp_path: Path) -> None:
    (tmp_path / "bard.json").write_text("{}")
    assert isinstance(open_judge(JudgeConfig(backend="scores", path=str(tmp_path))), ScoresJudge)


def test_the_models_own_lexicon_is_the_fallback_and_the_jobs_wins(tmp_path: Path) -> None:
    own, other = lexicon_file(tmp_path / "own.json", "summary"), lexicon_file(tmp_path / "other.json", "option")
    from_model = open_judge(JudgeConfig(backend="lexicon"), own)
    from_job = open_judge(JudgeConfig(backend="lexicon", path=str(other)), own)
    assert isinstance(from_model, LexiconJudge)
    assert isinstance(from_job, LexiconJudge)
    assert from_model.lexicon.own_words == {"summary"}
    assert from_job.lexicon.own_words == {"option"}


def test_a_model_without_lexicon_is_said() -> None:
    with pytest.raises(InputError, match="comes without a lexicon"):
        open_judge(JudgeConfig(backend="lexicon"))
