"""Where a catalogue comes from: the package, a folder or file of your own, or a folder in the published layout.

Three layouts, told apart by what is there:

    built-in, own folder    archetypes.yaml + questions.yaml
    own file                one YAML file with the keys `archetypes` and `questions`
    published               instructions/{name}.json + a .jsonl file of questions, there or in the parent folder

Knows nothing of jobs: what a run takes from a catalogue is `select.py`'s business. Every defect is an InputError of one
line that names file and entry; nothing is repaired or skipped.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from persona_ray.catalog.files import read_json, read_json_lines, read_yaml
from persona_ray.errors import InputError
from persona_ray.spec import Archetype, Catalog, Question

BUILTIN = "builtin"
PUBLISHED_DEFAULT = "default"
"""In the published layout the default Assistant is told by this file name; in ours by `default: true`."""

_NAME = re.compile(r"[a-z0-9_]+")
_PLACEHOLDER = re.compile(r"\{\w+\}")
_PUBLISHED_QUESTIONS = ("questions.jsonl", "extraction_questions.jsonl")


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _ArchetypeEntry(_Entry):
    description: str = ""
    default: bool = False
    system_prompts: list[str] = Field(min_length=1)


class _QuestionEntry(_Entry):
    question: str
    topic: str = ""
    theme: str = ""


class _PublishedInstruction(BaseModel):
    pos: str


class _PublishedRole(BaseModel):
    """The published files hold more than this; the rest is none of ours."""

    instruction: list[_PublishedInstruction] = Field(min_length=1)


class _PublishedQuestion(BaseModel):
    question: str


_Model = TypeVar("_Model", bound=BaseModel)


def load_catalog(source: str) -> Catalog:
    """The whole catalogue at `source`: `builtin`, or the path of a folder or YAML file. Raises InputError."""
    if source == BUILTIN:
        return load_catalog(str(resources.files("persona_ray.catalog") / "builtin"))
    path = Path(source)
    if path.is_file():
        return _own_file(path)
    if (path / "instructions").is_dir():
        return _published_folder(path)
    if path.is_dir():
        return _own_folder(path)
    raise InputError(
        f"catalogue {source}: no such file or folder; give {BUILTIN}, a YAML file, or a folder with archetypes.yaml and questions.yaml"
    )


def _own_folder(folder: Path) -> Catalog:
    archetypes, questions = folder / "archetypes.yaml", folder / "questions.yaml"
    for path in (archetypes, questions):
        if not path.is_file():
            raise InputError(
                f"{path}: missing; a catalogue folder holds archetypes.yaml and questions.yaml, or instructions/ in the published layout"
            )
    return _catalog(folder, _archetypes(read_yaml(archetypes), str(archetypes)), _questions(read_yaml(questions), str(questions)))


def _own_file(path: Path) -> Catalog:
    document = read_yaml(path)
    if not isinstance(document, dict) or set(document) != {"archetypes", "questions"}:
        found = ", ".join(map(str, document)) if isinstance(document, dict) else type(document).__name__
        raise InputError(f"{path}: a catalogue file has the keys archetypes and questions and no others; found: {found}")
    archetypes = _archetypes(document["archetypes"], f"{path}: archetypes")
    return _catalog(path, archetypes, _questions(document["questions"], f"{path}: questions"))


def _published_folder(folder: Path) -> Catalog:
    archetypes = [_published_role(path) for path in sorted((folder / "instructions").glob("*.json"))]
    lines = read_json_lines(_published_questions(folder))
    questions = [Question(_parse(_PublishedQuestion, value, where).question) for where, value in lines]
    return _catalog(folder, archetypes, questions)


def _published_role(path: Path) -> Archetype:
    role = _parse(_PublishedRole, read_json(path), str(path))
    prompts = tuple(item.pos for item in role.instruction)
    for number, prompt in enumerate(prompts):
        if placeholder := _PLACEHOLDER.search(prompt):
            raise InputError(f"{path}: instruction {number} holds the placeholder {placeholder[0]}; write out what stands for it")
    return _archetype(path.stem, "", prompts, is_default=path.stem == PUBLISHED_DEFAULT, where=str(path))


def _published_questions(folder: Path) -> Path:
    for place in (folder, folder.parent):
        for name in _PUBLISHED_QUESTIONS:
            if (place / name).is_file():
                return place / name
        found = sorted(place.glob("*.jsonl"))
        if len(found) == 1:
            return found[0]
    raise InputError(
        f'{folder}: no questions; put {_PUBLISHED_QUESTIONS[0]} (one {{"question": ...}} a line) there or into the parent folder'
    )


def _archetypes(document: Any, where: str) -> list[Archetype]:
    if not isinstance(document, dict):
        raise InputError(f"{where}: expected a mapping from archetype name to its texts, found {type(document).__name__}")
    return [_own_archetype(name, value, f"{where}: {name}") for name, value in document.items()]


def _own_archetype(name: Any, value: Any, where: str) -> Archetype:
    entry = _parse(_ArchetypeEntry, value, where)
    return _archetype(str(name), entry.description, tuple(entry.system_prompts), is_default=entry.default, where=where)


def _archetype(name: str, description: str, system_prompts: tuple[str, ...], *, is_default: bool, where: str) -> Archetype:
    if not _NAME.fullmatch(name):
        raise InputError(f"{where}: the name {name!r} may hold only a to z, 0 to 9 and _")
    for number, prompt in enumerate(system_prompts):
        if not prompt.strip() and (prompt or not is_default):
            raise InputError(
                f"{where}: system prompt {number} is blank; only the default Assistant may have an empty one (no system message)"
            )
    _refuse_repeated(system_prompts, f"{where}: system prompt")
    return Archetype(name, description, system_prompts, is_default)


def _questions(document: Any, where: str) -> list[Question]:
    """Grouped by theme, or a plain list."""
    if isinstance(document, dict):
        return [
            _question(item, str(theme), f"{where}: {theme} {number}")
            for theme, items in document.items()
            for number, item in enumerate(_parse_list(items, f"{where}: {theme}"))
        ]
    return [_question(item, "", f"{where}: {number}") for number, item in enumerate(_parse_list(document, where))]


def _question(item: Any, theme: str, where: str) -> Question:
    entry = _parse(_QuestionEntry, {"question": item} if isinstance(item, str) else item, where)
    if theme and entry.theme and entry.theme != theme:
        raise InputError(f"{where}: theme {entry.theme} stands under {theme}; leave it out")
    return Question(entry.question, entry.topic, theme or entry.theme)


def _catalog(path: Path, archetypes: list[Archetype], questions: list[Question]) -> Catalog:
    """What must hold of any catalogue, whatever it was read from."""
    if not archetypes:
        raise InputError(f"{path}: the catalogue has no archetypes")
    if not any(archetype.is_default for archetype in archetypes):
        raise InputError(
            f"{path}: no archetype is the default Assistant; mark it with `default: true` (published layout: {PUBLISHED_DEFAULT}.json)"
        )
    if not questions:
        raise InputError(f"{path}: the catalogue has no questions")
    for number, question in enumerate(questions):
        if not question.text.strip():
            raise InputError(f"{path}: question {number} is blank")
    _refuse_repeated((question.text for question in questions), f"{path}: question")
    return Catalog(tuple(archetypes), tuple(questions))


def _refuse_repeated(texts: Iterable[str], what: str) -> None:
    for text, count in Counter(texts).items():
        if count > 1:
            raise InputError(f"{what} {text!r} is there {count} times")


def _parse_list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{where}: expected a list of questions, found {type(value).__name__}")
    return value


def _parse(model: type[_Model], value: Any, where: str) -> _Model:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        text = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
        raise InputError(f"{where}: {key}: {text}" if key else f"{where}: {text}") from error
