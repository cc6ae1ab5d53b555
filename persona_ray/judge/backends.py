"""The judge that a job asks for."""

from __future__ import annotations

from pathlib import Path

from persona_ray.config import JudgeConfig
from persona_ray.errors import InputError
from persona_ray.judge.lexicon import Lexicon, LexiconJudge
from persona_ray.judge.scores import ScoresJudge
from persona_ray.spec import Judge


def open_judge(config: JudgeConfig, lexicon_path: Path | None = None) -> Judge | None:
    """The judge of `config`, or None for backend none. Raises InputError if what it needs is missing or wrong.

    `lexicon_path` is the lexicon that comes with the model, used if the job names none.
    """
    path = None if config.path is None else Path(config.path).expanduser()
    match config.backend:
        case "none":
            return None
        case "scores":
            if path is None:
                raise InputError("judge.path is missing: backend scores needs a folder of {archetype}.json")
            return ScoresJudge(path)
        case "lexicon":
            if (lexicon := path or lexicon_path) is None:
                raise InputError("judge.path is missing: this model comes without a lexicon; name a JSON file or another judge.backend")
            return LexiconJudge(Lexicon.load(lexicon))
        case _:
            raise InputError(f"judge.backend: {config.backend} is not available in this version")
