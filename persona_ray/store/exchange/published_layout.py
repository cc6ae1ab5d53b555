"""The published implementation's files: their names, keys and lines. Knows no tensors and no store.

    responses/{role}.jsonl    {system_prompt, prompt_index, question_index, question, conversation, label}
    activations/{role}.pt     {"pos_p{P}_q{Q}": (L, D)}
    scores/{role}.json        {"pos_p{P}_q{Q}": 0..3}; an absent key was not scored
    vectors/{role}.pt         {"vector": (L, D), "type": "pos_3" or "mean", "role"}
    axis.pt                   {"axis", "default_mean", "role_mean": (L, D), "n_default", "n_roles"}
    assistant_axis.pt, default_vector.pt, role_vectors/{role}.pt   (L, D) alone, as the released vectors are

One file name, `default`, is the default Assistant.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from persona_ray.errors import InputError
from persona_ray.spec import Message, Rollout
from persona_ray.store.scores import MAX_SCORE

DEFAULT_ROLE = "default"
LABEL = "pos"
NOTE_FILE = "export.json"
"""What the layout has no place for: layers, model, digests. Other tools do not see it."""
MAX_INDEX = 2**31 - 1
_KEY = re.compile(r"[A-Za-z]+_p(\d{1,9})_q(\d{1,9})")


class Turn(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(frozen=True)
    role: str
    content: str


class Line(BaseModel):
    """A line of a responses file; keys beyond these are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    system_prompt: str = ""
    prompt_index: int = Field(ge=0, le=MAX_INDEX)
    question_index: int = Field(ge=0, le=MAX_INDEX)
    question: str
    conversation: tuple[Turn, ...]
    label: str = LABEL

    @property
    def key(self) -> str:
        """Its name in the files of activations and scores."""
        return f"{self.label}_p{self.prompt_index}_q{self.question_index}"

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation."""
        return tuple(Message(turn.role, turn.content) for turn in self.conversation)

    @property
    def answers(self) -> tuple[int, ...]:
        """Places of the assistant's turns."""
        return tuple(place for place, turn in enumerate(self.conversation) if turn.role == "assistant")


def row_key(system_prompt: int, question: int) -> str:
    """What the layout calls a row of a role."""
    return f"{LABEL}_p{system_prompt}_q{question}"


def indices_of(key: str, where: str) -> tuple[int, int]:
    """The reverse: system prompt and question. Raises InputError naming `where`."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise InputError(f"{where}: {key[:60]!r} names no row; keys are pos_p0_q0, pos_p0_q1, ...")
    return int(match.group(1)), int(match.group(2))


def as_line(rollout: Rollout) -> dict[str, Any]:
    """The rollout as a responses file has it. Raises InputError for a later turn, whose conversation the row does not hold."""
    key, system = rollout.key, rollout.system_prompt
    asked = {"role": "user", "content": rollout.question}
    if key.turn == 1 and system:
        # No system role: the instruction opens the user's turn.
        before = [{"role": "user", "content": f"{system}\n\n{rollout.question}"}]
    else:
        before = [{"role": "system", "content": system}, asked] if system else [asked]
    if key.turn > len(before):
        raise InputError(
            f"row {rollout.index} is turn {key.turn} of its conversation, and the published layout knows one answer to a question"
        )
    return {
        "system_prompt": system,
        "prompt_index": key.system_prompt,
        "question_index": key.question,
        "question": rollout.question,
        "conversation": [*before, {"role": "assistant", "content": rollout.response}],
        "label": LABEL,
    }


def read_lines(file: Path) -> Iterator[Line]:
    """In file order. Raises InputError naming file and line."""
    try:
        with file.open(encoding="utf-8", newline="\n") as text:
            for number, line in enumerate(text, start=1):
                if line.strip():
                    yield _parsed(line, f"{file}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from error


def read_scores(file: Path) -> dict[str, int]:
    """Key -> score. Raises InputError naming the file and the key."""
    try:
        scores = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as scores ({error})") from error
    if not isinstance(scores, dict):
        raise InputError(f"{file}: scores are a JSON object, {{pos_p0_q0: 3, ...}}, this is a {type(scores).__name__}")
    wrong = next((key for key, score in scores.items() if type(score) is not int or not 0 <= score <= MAX_SCORE), None)
    if wrong is not None:
        raise InputError(f"{file}: {wrong}: a score is a whole number from 0 to {MAX_SCORE}, this is {json.dumps(scores[wrong])}")
    return scores


def _parsed(text: str, where: str) -> Line:
    try:
        line = Line.model_validate(json.loads(text))
        line.model_dump_json()
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg})") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{where}: {'.'.join(str(part) for part in first['loc'])}: {first['msg'].lower()}") from error
    except ValueError as error:
        raise InputError(f"{where}: half of a surrogate pair, which is no text") from error
    return line
