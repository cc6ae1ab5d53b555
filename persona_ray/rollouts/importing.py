"""Conversations that somebody else generated: a folder of `{archetype}.jsonl` in the published layout, or another run's rollouts."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from persona_ray.errors import InputError
from persona_ray.spec import Message, Rollout

DEFAULT_ARCHETYPE = "default"
"""In this layout, and only here, the file name `default.jsonl` is what marks the default Assistant."""


MAX_INDEX = 2**31 - 1
"""The store keeps indices as int32."""


class _Turn(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    role: str
    content: str


class _Line(BaseModel):
    """One line of a published responses file; keys beyond these are other tools' and are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    system_prompt: str = ""
    prompt_index: int = Field(ge=0, le=MAX_INDEX)
    question_index: int = Field(ge=0, le=MAX_INDEX)
    question: str
    conversation: tuple[_Turn, ...]


class ImportedConversation(BaseModel):
    """A conversation with its place in the design. `sample` counts repetitions of the same place."""

    model_config = ConfigDict(frozen=True)
    system_prompt: str
    prompt_index: int
    question_index: int
    question: str
    sample: int
    turns: tuple[_Turn, ...]

    @property
    def messages(self) -> tuple[Message, ...]:
        """All turns, empty ones included: a turn's index is its index here."""
        return tuple(Message(turn.role, turn.content) for turn in self.turns)


def read_conversations(place: str | Path) -> dict[str, tuple[ImportedConversation, ...]]:
    """Archetype -> its conversations, in file order; of a folder, or of one file. Raises InputError naming file and line."""
    root = Path(place).expanduser()
    files = [root] if root.suffix == ".jsonl" and root.is_file() else sorted(root.glob("*.jsonl"))
    if not files:
        raise InputError(f"rollouts.path: {place} holds no {{archetype}}.jsonl file")
    found = {file.stem: _read(file) for file in files}
    if not any(message.role == "assistant" for lines in found.values() for line in lines for message in line.messages):
        raise InputError(f"rollouts.path: no assistant turn in any file of {place}")
    return found


@dataclass(frozen=True, slots=True)
class TakenOver:
    """What another run's rollouts are as conversations, and what of them was left out: reason -> number of rollouts."""

    conversations: Mapping[str, tuple[ImportedConversation, ...]]
    left_out: Mapping[str, int]


def rollouts_as_conversations(rollouts: Sequence[Rollout]) -> TakenOver:
    """Archetype -> conversations of one question and one answer, ordered by place. Raises InputError if no rollout has an answer.

    What was refused there is taken if it has an answer's text: another model, or another limit, may well take it. Reasoning is left behind.
    """
    seen: set[tuple[str, int, int, int]] = set()
    kept: defaultdict[str, list[ImportedConversation]] = defaultdict(list)
    left_out: Counter[str] = Counter()
    for rollout in sorted(rollouts, key=lambda rollout: rollout.key):
        key = rollout.key
        place = (key.archetype, key.system_prompt, key.question, key.sample)
        if place in seen or key.turn > 1 + bool(rollout.system_prompt):
            left_out["a later turn: a rollout does not hold the turns before it"] += 1
        elif not rollout.response.strip():
            left_out["no answer"] += 1
        else:
            kept[key.archetype].append(_as_conversation(rollout))
        seen.add(place)
    if not kept:
        raise InputError(f"rollouts.path: none of the {len(rollouts)} rollouts of that run has an answer")
    return TakenOver({name: tuple(lines) for name, lines in kept.items()}, dict(left_out))


def _as_conversation(rollout: Rollout) -> ImportedConversation:
    system = (_Turn(role="system", content=rollout.system_prompt),) if rollout.system_prompt else ()
    return ImportedConversation(
        system_prompt=rollout.system_prompt,
        prompt_index=rollout.key.system_prompt,
        question_index=rollout.key.question,
        question=rollout.question,
        sample=rollout.key.sample,
        turns=(*system, _Turn(role="user", content=rollout.question), _Turn(role="assistant", content=rollout.response)),
    )


def _read(file: Path) -> tuple[ImportedConversation, ...]:
    seen: Counter[tuple[int, int]] = Counter()
    conversations = []
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from error
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        line = _parse(file, number, text)
        place = (line.prompt_index, line.question_index)
        fields: dict[str, Any] = line.model_dump(exclude={"conversation"})
        conversations.append(ImportedConversation(**fields, sample=seen[place], turns=line.conversation))
        seen[place] += 1
    if not conversations:
        raise InputError(f"{file}: holds no conversation")
    return tuple(conversations)


def _parse(file: Path, number: int, text: str) -> _Line:
    try:
        line = _Line.model_validate(json.loads(text))
        json.dumps(line.model_dump(), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{file}, line {number}: half of a surrogate pair, which is no text ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{file}, line {number}: not JSON ({error.msg})") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{file}, line {number}: {place}: {first['msg'].lower()}") from error
    return line
