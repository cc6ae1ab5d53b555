"""Scores that somebody has given already: a folder of `{archetype}.json` in the published layout.

Each file maps `pos_p{P}_q{Q}` (index of system prompt, index of question) to 0..3; what is absent was not scored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from persona_ray.errors import InputError
from persona_ray.spec import NOT_SCORED, Judgement, Rollout, RowKey, digest_of

_HIGHEST_SCORE = 3


class ScoresJudge:
    """Looks scores up. All files are read and checked at once, so a bad one is known before anything is scored."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError that names the file and the key: no such folder, no file in it, not JSON, not a score."""
        if not folder.is_dir():
            raise InputError(f"judge.path: {folder} is no folder; it should hold one {{archetype}}.json for every archetype")
        self._scores = {path.stem: _read(path) for path in sorted(folder.glob("*.json"))}
        if not self._scores:
            raise InputError(f"judge.path: {folder} holds no .json file; it should hold one {{archetype}}.json for every archetype")

    @property
    def settings(self) -> Mapping[str, Any]:
        """Backend, and the digest of all scores."""
        return {"backend": "scores", "scores_digest": digest_of(self._scores)}

    @property
    def name(self) -> str:
        """`scores-` and the digest of the settings."""
        return f"scores-{digest_of(self.settings)[:12]}"

    def judge(self, rollouts: Sequence[Rollout]) -> list[Judgement]:
        """The recorded score of every rollout, in order; -1 where there is none, `raw` says why."""
        return [self._judge(rollout.key) for rollout in rollouts]

    def _judge(self, key: RowKey) -> Judgement:
        if key.archetype not in self._scores:
            return Judgement(NOT_SCORED, f"not scored: there is no {key.archetype}.json")
        if key.sample:
            return Judgement(NOT_SCORED, f"not scored: {key.archetype}.json knows one sample of each question, this is sample {key.sample}")
        entry = f"pos_p{key.system_prompt}_q{key.question}"
        score = self._scores[key.archetype].get(entry)
        if score is None:
            return Judgement(NOT_SCORED, f"not scored: {key.archetype}.json has no {entry}")
        return Judgement(score, str(score))


def _read(path: Path) -> dict[str, int]:
    try:
        scores = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as scores ({error})") from error
    if not isinstance(scores, dict):
        raise InputError(f"{path}: scores are a JSON object, {{pos_p0_q0: 3, ...}}, this is a {type(scores).__name__}")
    for key, score in scores.items():
        if type(score) is not int or not 0 <= score <= _HIGHEST_SCORE:
            raise InputError(f"{path}: {key}: a score is a whole number from 0 to {_HIGHEST_SCORE}, this is {json.dumps(score)}")
    return scores


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key} is there twice")
        found[key] = value
    return found
