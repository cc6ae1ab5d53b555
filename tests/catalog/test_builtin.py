"""The built-in texts: complete, distinct, free of leftovers."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter, defaultdict

import pytest

from persona_ray.catalog.load import load_catalog
from persona_ray.spec import Archetype, Catalog

NAMES_SHA256 = "79402e8cffa1adaee05bb35652e72f95c755a5cb853fb7f119276ab090d66743"
"""Of the paper's 275 role names, sorted, joined by line feeds."""


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return load_catalog("builtin")


@pytest.fixture(scope="module")
def prompts(catalog: Catalog) -> list[tuple[str, str]]:
    """(archetype, system prompt), the empty one left out."""
    return [(archetype.name, prompt) for archetype in catalog.archetypes for prompt in archetype.system_prompts if prompt]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def test_the_archetypes_are_the_papers_275_and_the_default(catalog: Catalog) -> None:
    default, *roles = catalog.archetypes
    names = [archetype.name for archetype in roles]

    assert default.is_default
    assert not any(archetype.is_default for archetype in roles)
    assert "assistant" in names
    assert len(names) == 275
    assert names == sorted(names)
    assert hashlib.sha256("\n".join(names).encode()).hexdigest() == NAMES_SHA256


def test_every_archetype_has_five_system_prompts_and_only_the_default_an_empty_one(catalog: Catalog) -> None:
    assert {len(archetype.system_prompts) for archetype in catalog.archetypes} == {5}
    assert [(archetype.name, archetype.system_prompts.index("")) for archetype in catalog.archetypes if "" in archetype.system_prompts] == [
        ("default", 0)
    ]


def test_there_are_240_questions_in_even_themes(catalog: Catalog) -> None:
    assert len(catalog.questions) == 240
    assert set(Counter(question.theme for question in catalog.questions).values()) == {12}


def test_no_text_is_there_twice(catalog: Catalog, prompts: list[tuple[str, str]]) -> None:
    for texts in (
        [prompt for _, prompt in prompts],
        [archetype.description for archetype in catalog.archetypes],
        [question.text for question in catalog.questions],
        [question.topic for question in catalog.questions],
    ):
        assert Counter(texts).most_common(1)[0][1] == 1


def test_lengths(catalog: Catalog, prompts: list[tuple[str, str]]) -> None:
    assert [prompt for _, prompt in prompts if not 15 <= len(words(prompt)) <= 45] == []
    assert [archetype.name for archetype in catalog.archetypes if not 6 <= len(words(archetype.description)) <= 30] == []
    assert [question.text for question in catalog.questions if not 5 <= len(words(question.text)) <= 22] == []


def test_no_leftovers_of_a_template(catalog: Catalog, prompts: list[tuple[str, str]]) -> None:
    texts = [prompt for _, prompt in prompts]
    texts += [archetype.description for archetype in catalog.archetypes]
    texts += [question.text for question in catalog.questions]

    assert [text for text in texts if re.search(r"[{}\[\]<>_#*]|TODO|\s{2}|[^\x20-\x7e]|^\s|\s$", text)] == []


def test_a_question_holds_its_topic_and_ends_properly(catalog: Catalog) -> None:
    assert [question for question in catalog.questions if question.topic not in words(question.text)] == []
    assert [question.text for question in catalog.questions if not question.text.endswith(("?", "."))] == []


def test_at_least_one_system_prompt_names_its_archetype(catalog: Catalog) -> None:
    def named(archetype: Archetype) -> bool:
        spelled = re.sub(r"[^a-z]", "", archetype.name)
        return any(spelled in re.sub(r"[^a-z]", "", prompt.lower()) for prompt in archetype.system_prompts)

    unnamed = [archetype.name for archetype in catalog.archetypes if not archetype.is_default and not named(archetype)]
    assert unnamed == []


def test_no_two_system_prompts_share_more_than_half_of_their_trigrams(prompts: list[tuple[str, str]]) -> None:
    """With the archetype's name removed: otherwise one frame with the name filled in would pass for 275 prompts."""
    trigrams = [_trigrams(name, prompt) for name, prompt in prompts]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, own in enumerate(trigrams):
        for trigram in own:
            holders[trigram].append(number)
    shared = Counter(pair for numbers in holders.values() for pair in itertools.combinations(numbers, 2))

    alike = [(prompts[a], prompts[b]) for (a, b), count in shared.items() if count > 0.5 * min(len(trigrams[a]), len(trigrams[b]))]
    assert alike == []


def _trigrams(name: str, prompt: str) -> set[tuple[str, ...]]:
    parts = set(name.split("_"))
    kept = [word for word in words(prompt) if word not in parts and word.rstrip("s") not in parts]
    return set(zip(kept, kept[1:], kept[2:], strict=False))


def test_the_digest_is_stable_and_sees_every_edit(catalog: Catalog) -> None:
    assert load_catalog("builtin").digest == catalog.digest
    first, *others = catalog.archetypes
    edited = Archetype(first.name, first.description, (*first.system_prompts[:-1], "Speak."), first.is_default)
    assert Catalog((edited, *others), catalog.questions).digest != catalog.digest
    assert Catalog(catalog.archetypes, catalog.questions[::-1]).digest != catalog.digest
