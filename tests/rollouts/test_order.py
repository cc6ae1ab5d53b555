"""The balanced order: any prefix is a valid smaller experiment."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from persona_ray.rollouts.importing import ImportedConversation
from persona_ray.rollouts.order import grid_walk, shuffled
from persona_ray.rollouts.wanted import further_rows, rows_to_generate, rows_to_import
from persona_ray.spec import Archetype

sizes = st.integers(1, 12)


def spread(counts: Counter[object], keys: list[object]) -> int:
    values = [counts[key] for key in keys]
    return max(values) - min(values)


@given(num_prompts=sizes, num_questions=sizes)
def test_the_walk_visits_every_cell_once(num_prompts: int, num_questions: int) -> None:
    cells = list(grid_walk(num_prompts, num_questions))
    assert sorted(cells) == [(p, q) for p in range(num_prompts) for q in range(num_questions)]


@given(
    num_archetypes=st.integers(1, 4),
    num_prompts=st.integers(1, 5),
    num_questions=st.integers(1, 7),
    samples=st.integers(1, 2),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_every_prefix_is_balanced(num_archetypes: int, num_prompts: int, num_questions: int, samples: int, seed: int) -> None:
    archetypes = [
        Archetype(f"a{i}", "", tuple(f"prompt {p}" for p in range(num_prompts)), is_default=i == 0) for i in range(num_archetypes)
    ]
    questions = {10 * i: f"question {i}" for i in range(num_questions)}
    rows = rows_to_generate(archetypes, num_prompts=num_prompts, questions=questions, samples=samples, seed=seed)
    assert len({row.key for row in rows}) == len(rows) == num_archetypes * num_prompts * num_questions * samples
    assert [row.index for row in rows] == list(range(len(rows)))

    by_archetype: Counter[object] = Counter()
    by_prompt: Counter[object] = Counter()
    asked: Counter[object] = Counter()
    names = [a.name for a in archetypes]
    for row in rows:
        key = row.key
        by_archetype[key.archetype] += 1
        by_prompt[key.archetype, key.system_prompt] += 1
        asked[key.archetype, key.question] += 1
        assert spread(by_archetype, list(names)) <= 1
        assert spread(by_prompt, [(name, p) for name in names for p in range(num_prompts)]) <= 1
        assert spread(asked, [(key.archetype, q) for q in questions]) <= 1


def test_an_empty_system_prompt_means_no_system_message() -> None:
    rows = rows_to_generate(
        [Archetype("default", "", ("", "Be yourself."), is_default=True)], num_prompts=2, questions={5: "Why?"}, samples=1, seed=0
    )
    assert [[message.role for message in row.conversation] for row in rows] == [["user"], ["system", "user"]]
    assert [row.key.turn for row in rows] == [1, 2]


@given(num_items=st.integers(0, 50), seed=st.integers(0, 9))
def test_shuffling_is_a_permutation(num_items: int, seed: int) -> None:
    assert sorted(shuffled(num_items, seed)) == list(range(num_items))


def conversation(prompt: int, question: int, roles: str = "ua", sample: int = 0) -> ImportedConversation:
    names = {"u": "user", "a": "assistant", "s": "system"}
    turns = tuple({"role": names[role], "content": f"{role}{i}"} for i, role in enumerate(roles))
    return ImportedConversation.model_validate(
        {"system_prompt": "", "prompt_index": prompt, "question_index": question, "question": "q", "sample": sample, "turns": turns}
    )


def test_imported_archetypes_take_turns_and_each_is_balanced() -> None:
    grid = [conversation(p, q) for p in range(2) for q in range(4)]
    rows = rows_to_import({"bard": grid, "angel": grid[:4]})
    assert [row.key.archetype for row in rows[:8]] == ["angel", "bard"] * 4
    bard = [row.key for row in rows if row.key.archetype == "bard"]
    assert [key.system_prompt for key in bard] == [0, 1] * 4
    assert sorted(key.question for key in bard[:4]) == [0, 1, 2, 3]


def test_every_assistant_turn_is_a_row_of_its_own_by_its_index_in_the_conversation() -> None:
    rows = rows_to_import({"bard": [conversation(0, 0, "suaua"), conversation(0, 1, "uu")]})
    assert [row.key.turn for row in rows] == [2, 4]
    assert [message.content for message in rows[0].conversation] == ["s0", "u1", "a2"]
    assert [message.content for message in rows[1].conversation] == ["s0", "u1", "a2", "u3", "a4"]


@given(num_archetypes=st.integers(1, 3), num_prompts=st.integers(1, 4), num_questions=st.integers(1, 5), rows_each=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_further_rows_are_those_that_the_job_would_go_on_with(
    num_archetypes: int, num_prompts: int, num_questions: int, rows_each: int
) -> None:
    archetypes = [Archetype(f"a{i}", "", tuple(f"prompt {p}" for p in range(num_prompts)), is_default=False) for i in range(num_archetypes)]
    questions = {i: f"question {i}" for i in range(num_questions)}
    rows = further_rows(archetypes, num_prompts=num_prompts, questions=questions, first_sample=2, rows_each=rows_each, seed=3)
    samples = 2 + -(-rows_each // (num_prompts * num_questions))
    longer = rows_to_generate(archetypes, num_prompts=num_prompts, questions=questions, samples=samples, seed=3)
    own = 2 * num_archetypes * num_prompts * num_questions
    assert [row.key for row in rows] == [row.key for row in longer[own : own + len(rows)]]
    assert Counter(row.key.archetype for row in rows) == {archetype.name: rows_each for archetype in archetypes}
    assert [row.index for row in rows] == list(range(len(rows)))
