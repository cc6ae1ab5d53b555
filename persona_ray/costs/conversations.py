"""How long a job's conversations are: its real prompts through its real tokenizer, all of them or as many as tell it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

import numpy as np

from persona_ray.rollouts.produce import import_rollouts
from persona_ray.rollouts.transcript import Transcriber
from persona_ray.spec import FinishReason, Rollout, Row

SAMPLE_ROWS = 1_024
"""Prompts that are tokenized; of more rows, so many at random."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of a conversation, on average over the rows that are not refused for their length."""

    prompt_tokens: float
    answer_tokens: float | None
    """Of imported text; None: the answers are still to be given."""
    num_read: int
    num_rows: int
    usable_share: float
    """Of the rows that were read, those that are short enough."""
    error_tokens: float
    """Two standard errors of `prompt_tokens`; 0 if all rows were read."""

    @property
    def source(self) -> str:
        """In words."""
        if self.num_read == self.num_rows:
            return f"all {self.num_rows:,} rows, tokenized"
        return f"{self.num_read:,} of {self.num_rows:,} rows, tokenized; +- {self.error_tokens:.1f} (two standard errors)"


def read_lengths(rows: Sequence[Row], transcriber: Transcriber, *, max_length: int, max_new_tokens: int | None) -> Lengths:
    """`max_new_tokens` None: the conversations are imported, with their answers. The same rows give the same numbers."""
    some = rows if len(rows) <= SAMPLE_ROWS else random.Random(0).sample(rows, SAMPLE_ROWS)  # noqa: S311
    if max_new_tokens is None:
        told = [rollout for rollout in import_rollouts(some, transcriber=transcriber, max_length=max_length) if rollout.refusal is None]
        prompts = [rollout.response_start for rollout in told]
        answers = [len(rollout.token_ids) - rollout.response_start for rollout in told]
    else:
        lengths = [len(transcriber.prompt_ids(row.conversation)) for row in some]
        prompts, answers = [length for length in lengths if length + max_new_tokens <= max_length], []
    error = 2 * stdev(prompts) / len(prompts) ** 0.5 if len(some) < len(rows) and len(prompts) > 1 else 0.0
    return Lengths(
        prompt_tokens=fmean(prompts) if prompts else 0.0,
        answer_tokens=None if max_new_tokens is not None else fmean(answers) if answers else 0.0,
        num_read=len(some),
        num_rows=len(rows),
        usable_share=len(prompts) / len(some),
        error_tokens=error,
    )


def like_rollouts(rows: Sequence[Row], transcriber: Transcriber, *, max_length: int, answer_tokens: float | None) -> tuple[Rollout, ...]:
    """Rollouts of these rows, for the size of their text: imported ones as they are, others with made-up answers of `answer_tokens`.

    A made-up answer is drawn from the words of the rows' own texts. It says nothing, and is as hard to compress as what a model says.
    """
    if answer_tokens is None:
        return import_rollouts(rows, transcriber=transcriber, max_length=max_length)
    words = [word for row in rows for message in row.conversation for word in message.content.split()]
    rng = random.Random(0)  # noqa: S311
    return tuple(_answered(row, transcriber, words, round(answer_tokens * rng.uniform(0.5, 1.5)), rng) for row in rows)


def _answered(row: Row, transcriber: Transcriber, words: Sequence[str], length: int, rng: random.Random) -> Rollout:
    prompt_ids = transcriber.prompt_ids(row.conversation)
    text = " ".join(rng.choices(words, k=max(1, length)))  # a word has a token or more
    answer_ids = np.asarray(transcriber.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)[:length]
    made = transcriber.generated(prompt_ids, answer_ids)
    whole = replace(made, start=len(prompt_ids), end=len(made.token_ids))
    return Rollout(
        index=row.index,
        key=row.key,
        system_prompt=row.system_prompt,
        question=row.question,
        response=whole.response,
        token_ids=whole.token_ids,
        response_start=whole.start,
        response_end=whole.end,
        finish_reason=FinishReason.LENGTH,
        refusal=None,
    )
