"""Every layout loads; every defect is one line that names file and entry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from persona_ray.catalog.load import load_catalog
from persona_ray.errors import InputError
from persona_ray.spec import Question

ARCHETYPES = """\
helper: {description: Helps., default: true, system_prompts: [""]}
sailor: {description: Sails., system_prompts: [Sail with me., The sea is yours.]}
"""
QUESTIONS = """\
sea:
  - {question: What is salt?, topic: salt}
land:
  - {question: What is soil?, topic: soil}
"""


def own_folder(tmp_path: Path, archetypes: str = ARCHETYPES, questions: str = QUESTIONS) -> str:
    (tmp_path / "archetypes.yaml").write_text(archetypes)
    (tmp_path / "questions.yaml").write_text(questions)
    return str(tmp_path)


def published_folder(root: Path, roles: dict[str, object], questions: str = '{"question": "Why?"}\n', at: str = "questions.jsonl") -> str:
    (root / "roles" / "instructions").mkdir(parents=True)
    for name, role in roles.items():
        (root / "roles" / "instructions" / f"{name}.json").write_text(json.dumps(role))
    (root / at).write_text(questions)
    return str(root / "roles")


def role(*prompts: str) -> dict[str, object]:
    return {"instruction": [{"pos": prompt} for prompt in prompts], "eval_prompt": "Rate it."}


def test_own_folder(tmp_path: Path) -> None:
    catalog = load_catalog(own_folder(tmp_path))

    assert [(archetype.name, archetype.is_default, len(archetype.system_prompts)) for archetype in catalog.archetypes] == [
        ("helper", True, 1),
        ("sailor", False, 2),
    ]
    assert catalog.questions == (Question("What is salt?", "salt", "sea"), Question("What is soil?", "soil", "land"))


@pytest.mark.parametrize(
    ("questions", "expected"),
    [
        ("{sea: [What is salt?]}", Question("What is salt?", "", "sea")),
        ("[What is salt?]", Question("What is salt?")),
        ("[{question: What is salt?, topic: salt, theme: sea}]", Question("What is salt?", "salt", "sea")),
    ],
)
def test_own_file_with_questions_by_theme_or_in_a_plain_list(tmp_path: Path, questions: str, expected: Question) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"archetypes:\n  {ARCHETYPES.replace(chr(10), chr(10) + '  ')}\nquestions: {questions}\n")

    catalog = load_catalog(str(path))
    assert catalog.questions == (expected,)
    assert catalog.archetypes[1].system_prompts == ("Sail with me.", "The sea is yours.")


def test_names_that_yaml_takes_for_other_values_stay_names(tmp_path: Path) -> None:
    catalog = load_catalog(own_folder(tmp_path, ARCHETYPES + "7: {system_prompts: [Be seven.]}\n"))
    assert catalog.archetypes[-1].name == "7"


@pytest.mark.parametrize("at", ["questions.jsonl", "extraction_questions.jsonl", "roles/questions.jsonl", "roles/other_name.jsonl"])
def test_published_folder(tmp_path: Path, at: str) -> None:
    questions = '{"question": "Why?", "id": 7}\n\n{"question": "How?"}\n'
    roles: dict[str, object] = {"pirate": role("Be a pirate.", "Arr."), "default": role("", "You are an AI assistant.")}
    catalog = load_catalog(published_folder(tmp_path, roles, questions, at))

    assert [(archetype.name, archetype.is_default) for archetype in catalog.archetypes] == [("default", True), ("pirate", False)]
    assert catalog.archetypes[1].system_prompts == ("Be a pirate.", "Arr.")
    assert [question.text for question in catalog.questions] == ["Why?", "How?"]


def test_only_the_published_layout_knows_the_default_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no archetype is the default Assistant"):
        load_catalog(own_folder(tmp_path, "default: {system_prompts: [Hello.]}"))


@pytest.mark.parametrize(
    ("archetypes", "message"),
    [
        ("{}", "no archetypes"),
        ("", "archetypes.yaml: expected a mapping"),
        ("[a, b]", "archetypes.yaml: expected a mapping"),
        ("a: [b", "archetypes.yaml: not YAML"),
        ("a: \x07", "archetypes.yaml: not YAML"),
        (
            "sailor: {default: true, system_prompts: [A.]}\nsailor: {system_prompts: [B.]}",
            "archetypes.yaml line 2: 'sailor' is there twice",
        ),
        ("sailor: {default: true, system_prompts: [A.], system_prompts: [B.]}", "'system_prompts' is there twice"),
        ("sailor: {system_prompts: [A.]}", "no archetype is the default"),
        ("Sea Dog: {system_prompts: [A.]}", "'Sea Dog' may hold only"),
        ('"": {system_prompts: [A.]}', "'' may hold only"),
        ("sailor: {}", "sailor: system_prompts: Field required"),
        ("sailor: {system_prompts: []}", "sailor: system_prompts"),
        ("sailor: {system_prompts: A.}", "sailor: system_prompts"),
        ("sailor: {system_prompts: [A., 7]}", r"sailor: system_prompts\.1"),
        ("sailor: {system_prompts: [A., '']}", "sailor: system prompt 1 is blank"),
        ("sailor: {default: true, system_prompts: [A., ' ']}", "sailor: system prompt 1 is blank"),
        ("sailor: {system_prompts: [A., A.]}", "sailor: system prompt 'A.' is there 2 times"),
        ("sailor: {system_prompts: [A.], prompts: [B.]}", "sailor: prompts: unknown key"),
        ("sailor: {system_prompts: [A.], default: 'yes'}", "sailor: default"),
        ("sailor: A.", "archetypes.yaml: sailor"),
    ],
)
def test_defects_of_archetypes(tmp_path: Path, archetypes: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_catalog(own_folder(tmp_path, archetypes))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ("[]", "no questions"),
        ("", "questions.yaml: expected a list"),
        ("sea: What?", "questions.yaml: sea: expected a list"),
        ("sea: [What?]\nsea: [Why?]", "questions.yaml line 2: 'sea' is there twice"),
        ("[What?, What?]", "question 'What.' is there 2 times"),
        ("[What?, ' ']", "question 1 is blank"),
        ("sea: [What?, {topic: salt}]", "sea 1: question: Field required"),
        ("sea: [{question: What?, subject: salt}]", "sea 0: subject: unknown key"),
        ("sea: [{question: What?, theme: land}]", "sea 0: theme land stands under sea"),
        ("[7]", "questions.yaml: 0"),
    ],
)
def test_defects_of_questions(tmp_path: Path, questions: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_catalog(own_folder(tmp_path, questions=questions))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("roles", "questions", "message"),
    [
        ({}, '{"question": "Why?"}', "no archetypes"),
        ({"pirate": role("Arr.")}, '{"question": "Why?"}', r"default\.json"),
        ({"default": role("")}, "", "no questions"),
        ({"default": role("")}, '{"question": "Why?"}\n{"text": "How?"}', "line 2: question: Field required"),
        ({"default": role("")}, "Why?", "line 1: not JSON"),
        ({"default": role("", "You are {model_name}.")}, '{"question": "Why?"}', r"default\.json: instruction 1 .*\{model_name\}"),
        ({"default": role(""), "pirate": role("")}, '{"question": "Why?"}', r"pirate\.json: system prompt 0 is blank"),
        ({"default": {"instructions": []}}, '{"question": "Why?"}', r"default\.json: instruction: Field required"),
    ],
)
def test_defects_of_the_published_layout(tmp_path: Path, roles: dict[str, object], questions: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_catalog(published_folder(tmp_path, roles, questions))
    assert str(tmp_path) in str(caught.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        load_catalog(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"archetypes\.yaml: missing"):
        load_catalog(str(tmp_path))
    (tmp_path / "archetypes.yaml").write_text(ARCHETYPES)
    with pytest.raises(InputError, match=r"questions\.yaml: missing"):
        load_catalog(str(tmp_path))
    (tmp_path / "instructions").mkdir()
    with pytest.raises(InputError, match=r"questions\.jsonl"):
        load_catalog(str(tmp_path))


def test_a_file_that_is_not_a_catalogue(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("model: {id: gpt2}\nstore: {url: out}\n")
    with pytest.raises(InputError, match="found: model, store"):
        load_catalog(str(path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read as UTF-8"):
        load_catalog(str(path))
