"""Judging by vocabulary: for models, like the shipped tiny one, whose archetypes each have words of their own.

A lexicon lists those words. It needs no second model, is exact and repeatable, and means nothing for a model that was not
trained on such vocabularies.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from persona_ray.errors import InputError
from persona_ray.spec import NOT_SCORED, Judgement, Rollout, digest_of

SCORE_FROM_SHARE = ((0.75, 3), (0.5, 2), (0.25, 1))
"""Least share of own words -> score, strictest first; below the last: 0."""

_WORD = re.compile(r"[a-z']+")


class ArchetypeWords(BaseModel):
    """The words of one archetype; another may have some of them too."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    group: str
    words: frozenset[str] = Field(min_length=1)


class Lexicon(BaseModel):
    """Who says which words. Words are lower case, of letters and apostrophes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    archetypes: Mapping[str, ArchetypeWords] = Field(min_length=1)
    groups: Mapping[str, frozenset[str]]
    """Group -> words that all its archetypes share. They do not count for scores, only for the Assistant's share."""
    assistant_side: frozenset[str] = Field(min_length=1)
    """Groups whose words belong to the Assistant's side."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, archetype in self.archetypes.items():
            if archetype.group not in self.groups:
                known = ", ".join(sorted(self.groups))
                raise ValueError(f"archetype {name} is of group {archetype.group}, which is not among groups ({known})")
        if unknown := self.assistant_side - set(self.groups):
            raise ValueError(f"assistant_side names {', '.join(sorted(unknown))}, which is not among groups")
        for word in sorted(frozenset().union(*self.groups.values(), self.own_words)):
            if not _WORD.fullmatch(word):
                raise ValueError(f"{word!r} is not a lower-case word of letters and apostrophes, so no answer can contain it")
        return self

    @classmethod
    def load(cls, path: Path) -> Lexicon:
        """The JSON file at `path`. Raises InputError naming file and entry."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise InputError(f"{path}: cannot be read as a lexicon ({error.strerror})") from error
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "lexicon"
            raise InputError(f"{path}: {place}: {first['msg'].removeprefix('Value error, ')}") from error

    @property
    def own_words(self) -> frozenset[str]:
        """Words of any archetype's own list."""
        return frozenset().union(*(archetype.words for archetype in self.archetypes.values()))

    def words_of_side(self, *, assistant: bool) -> frozenset[str]:
        """Own and group words of the Assistant's side, or of the other."""
        groups = {group for group in self.groups if (group in self.assistant_side) == assistant}
        own = (archetype.words for archetype in self.archetypes.values() if archetype.group in groups)
        return frozenset().union(*own, *(self.groups[group] for group in groups))

    @property
    def digest(self) -> str:
        """SHA-256 of the content; the order of words does not matter."""
        return digest_of(
            {
                "archetypes": {name: [archetype.group, sorted(archetype.words)] for name, archetype in self.archetypes.items()},
                "groups": {group: sorted(words) for group, words in self.groups.items()},
                "assistant_side": sorted(self.assistant_side),
            }
        )


@dataclass(frozen=True, slots=True)
class OwnWords:
    """What was counted in one answer."""

    own: int
    lexicon: int
    """Words of any archetype, the own ones included; group words that no archetype lists do not count."""

    @property
    def share(self) -> float:
        """Own words among lexicon words; 0 if there is none."""
        return self.own / self.lexicon if self.lexicon else 0.0

    @property
    def score(self) -> int:
        """0..3."""
        return next((score for least, score in SCORE_FROM_SHARE if self.share >= least), 0)


class LexiconJudge:
    """Scores an answer by the share of its lexicon words that are its archetype's own."""

    def __init__(self, lexicon: Lexicon) -> None:
        self.lexicon = lexicon
        self._own_words = lexicon.own_words
        assistant, other = lexicon.words_of_side(assistant=True), lexicon.words_of_side(assistant=False)
        self._assistant_words, self._other_words = assistant - other, other - assistant

    @property
    def settings(self) -> Mapping[str, Any]:
        """Backend, digest of the lexicon, and thresholds."""
        return {"backend": "lexicon", "lexicon_digest": self.lexicon.digest, "score_from_share": [list(step) for step in SCORE_FROM_SHARE]}

    @property
    def name(self) -> str:
        """`lexicon-` and the digest of the settings."""
        return f"lexicon-{digest_of(self.settings)[:12]}"

    def judge(self, rollouts: Sequence[Rollout]) -> list[Judgement]:
        """One score for every rollout, in order; -1 for an archetype that the lexicon does not have. `raw` is JSON with the counts."""
        return [self._judge(rollout.key.archetype, rollout.response) for rollout in rollouts]

    def assistant_share(self, text: str) -> tuple[int, int]:
        """(words of the Assistant's side, words of either side) in `text`. A word that both sides have tells nothing and is not counted."""
        words = _WORD.findall(text.lower())
        assistant = sum(word in self._assistant_words for word in words)
        return assistant, assistant + sum(word in self._other_words for word in words)

    def _judge(self, archetype: str, response: str) -> Judgement:
        if archetype not in self.lexicon.archetypes:
            return Judgement(NOT_SCORED, json.dumps({"not_scored": f"archetype {archetype} is not in the lexicon"}))
        own_words = self.lexicon.archetypes[archetype].words
        words = _WORD.findall(response.lower())
        counted = OwnWords(own=sum(word in own_words for word in words), lexicon=sum(word in self._own_words for word in words))
        return Judgement(counted.score, json.dumps({"own": counted.own, "lexicon": counted.lexicon, "share": round(counted.share, 4)}))
