"""How long conversations are: the shipped model's tokenizer on the shipped catalogue."""

from __future__ import annotations

from importlib.resources import files
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_ray.catalog.load import load_catalog
from persona_ray.costs.conversations import SAMPLE_ROWS, like_rollouts, read_lengths
from persona_ray.rollouts.transcript import Transcriber
from persona_ray.rollouts.wanted import rows_to_generate
from persona_ray.spec import Message, Row, RowKey
from persona_ray.store.text import encode_rollouts


@pytest.fixture(scope="module")
def transcriber() -> Transcriber:
    return Transcriber(str(files("persona_ray") / "data" / "tiny-persona"))


@pytest.fixture(scope="module")
def rows() -> tuple[Row, ...]:
    catalog = load_catalog("builtin")
    questions = {number: question.text for number, question in enumerate(catalog.questions[:4])}
    return rows_to_generate(catalog.archetypes, num_prompts=2, questions=questions, samples=1, seed=0)


def test_some_prompts_tell_how_long_all_are(transcriber: Transcriber, rows: tuple[Row, ...]) -> None:
    assert len(rows) > 2 * SAMPLE_ROWS
    found = read_lengths(rows, transcriber, max_length=512, max_new_tokens=64)
    truth = fmean(len(transcriber.prompt_ids(row.conversation)) for row in rows)
    assert abs(found.prompt_tokens - truth) <= 1.5 * found.error_tokens
    assert 0 < found.error_tokens < 0.05 * truth
    assert found.source.startswith("1,024 of 2,208 rows, tokenized; +- ")
    assert read_lengths(rows, transcriber, max_length=512, max_new_tokens=64) == found
    assert (found.usable_share, found.answer_tokens) == (1.0, None)


def test_few_prompts_are_all_read_and_too_long_ones_left_out(transcriber: Transcriber, rows: tuple[Row, ...]) -> None:
    few = rows[:40]
    lengths = sorted(len(transcriber.prompt_ids(row.conversation)) for row in few)
    limit = lengths[20]
    found = read_lengths(few, transcriber, max_length=limit + 8, max_new_tokens=8)
    fitting = [length for length in lengths if length <= limit]
    assert found.prompt_tokens == pytest.approx(fmean(fitting))
    assert (found.usable_share, found.error_tokens) == (len(fitting) / 40, 0)
    assert found.source == "all 40 rows, tokenized"
    nothing = read_lengths(few, transcriber, max_length=10, max_new_tokens=8)
    assert (nothing.usable_share, nothing.prompt_tokens) == (0, 0)


def test_imported_text_has_its_own_answers(transcriber: Transcriber) -> None:
    said = ["The sea keeps no promises.", "Rain.", ""]
    rows = [
        Row(place, RowKey("bard", 0, place, 0, 1), "", "Why?", (Message("user", "Why?"), Message("assistant", text)))
        for place, text in enumerate(said)
    ]
    found = read_lengths(rows, transcriber, max_length=512, max_new_tokens=None)
    answers = [len(transcriber.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in said[:2]]
    assert found.answer_tokens == fmean(answers)
    assert found.usable_share == pytest.approx(2 / 3)
    assert [text.response for text in like_rollouts(rows, transcriber, max_length=512, answer_tokens=None)] == said


@settings(max_examples=20)
@given(answer_tokens=st.floats(1, 200))
def test_made_up_answers_are_as_long_as_is_assumed(transcriber: Transcriber, rows: tuple[Row, ...], answer_tokens: float) -> None:
    made = like_rollouts(rows[:24], transcriber, max_length=512, answer_tokens=answer_tokens)
    lengths = [text.response_end - text.response_start for text in made]
    assert abs(fmean(lengths) / answer_tokens - 1) <= 0.35
    for row, text in zip(rows, made, strict=False):
        assert (text.key, text.index) == (row.key, row.index)
        assert np.array_equal(text.token_ids[: text.response_start], transcriber.prompt_ids(row.conversation))
        assert text.response_end == len(text.token_ids)


def test_they_are_the_same_again_and_longer_ones_take_more(transcriber: Transcriber, rows: tuple[Row, ...]) -> None:
    sizes = [
        len(encode_rollouts(like_rollouts(rows[:36], transcriber, max_length=512, answer_tokens=tokens))) for tokens in (30.0, 30.0, 60.0)
    ]
    assert sizes[0] == sizes[1] < sizes[2]
