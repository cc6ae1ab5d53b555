"""Which rows a job wants, in work order. Knows the catalogue's values and imported conversations; nothing of tokens or stores."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from persona_ray.rollouts.importing import ImportedConversation
from persona_ray.rollouts.order import grid_walk, shuffled
from persona_ray.spec import Archetype, Message, Row, RowKey


def rows_to_generate(
    archetypes: Sequence[Archetype], *, num_prompts: int, questions: Mapping[int, str], samples: int, seed: int
) -> tuple[Row, ...]:
    """One row for archetype x system prompt x question x sample. `questions`: index in the catalogue -> text."""
    return tuple(_in_work_order(archetypes, num_prompts, questions, range(samples), seed))


def further_rows(
    archetypes: Sequence[Archetype], *, num_prompts: int, questions: Mapping[int, str], first_sample: int, rows_each: int, seed: int
) -> tuple[Row, ...]:
    """The first `rows_each` rows of each archetype that `rows_to_generate` would go on with, from sample `first_sample` on."""
    rows = _in_work_order(archetypes, num_prompts, questions, itertools.count(first_sample), seed)
    return tuple(itertools.islice(rows, rows_each * len(archetypes)))


def _in_work_order(
    archetypes: Sequence[Archetype], num_prompts: int, questions: Mapping[int, str], samples: Iterable[int], seed: int
) -> Iterator[Row]:
    indices = list(questions)
    order = [indices[i] for i in shuffled(len(indices), seed)]
    index = itertools.count()
    for sample in samples:
        for prompt, place in grid_walk(num_prompts, len(order)):
            for archetype in archetypes:
                yield generated_row(archetype, prompt, order[place], questions[order[place]], sample, index=next(index))


def generated_row(archetype: Archetype, prompt: int, question: int, text: str, sample: int, *, index: int = 0) -> Row:
    """What the model is asked for one row key."""
    system_prompt = archetype.system_prompts[prompt]
    conversation = opening(system_prompt, text)
    key = RowKey(archetype.name, prompt, question, sample, turn=len(conversation))
    return Row(index, key, system_prompt, text, conversation)


def opening(system_prompt: str, question: str) -> tuple[Message, ...]:
    """A question to a character. An empty system prompt means no system message at all."""
    system = (Message("system", system_prompt),) if system_prompt else ()
    return (*system, Message("user", question))


def rows_to_import(conversations: Mapping[str, Sequence[ImportedConversation]]) -> tuple[Row, ...]:
    """One row for each assistant turn of each conversation; archetypes take turns, each walking its own grid."""
    queues = [_turns(name, conversations[name]) for name in sorted(conversations)]
    interleaved = (row for round_ in itertools.zip_longest(*queues) for row in round_ if row is not None)
    return tuple(Row(index, key, c.system_prompt, c.question, messages) for index, (key, c, messages) in enumerate(interleaved))


def _turns(archetype: str, conversations: Sequence[ImportedConversation]) -> list[tuple[RowKey, ImportedConversation, tuple[Message, ...]]]:
    prompts = sorted({c.prompt_index for c in conversations})
    questions = sorted({c.question_index for c in conversations})
    place = {(prompts[p], questions[q]): step for step, (p, q) in enumerate(grid_walk(len(prompts), len(questions)))}
    ordered = sorted(conversations, key=lambda c: (place[c.prompt_index, c.question_index], c.sample))
    return [
        (RowKey(archetype, c.prompt_index, c.question_index, c.sample, turn), c, c.messages[: turn + 1])
        for c in ordered
        for turn, message in enumerate(c.messages)
        if message.role == "assistant"
    ]
