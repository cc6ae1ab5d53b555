"""Which tokens are the answer: by construction for generated text, by template for imported text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from persona_ray.errors import InputError
from persona_ray.rollouts.transcript import Transcriber
from persona_ray.spec import Message

TEMPLATES = {
    # Content verbatim, ChatML.
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # Content trimmed, header and blank line.
    "trimmed": "{% for m in messages %}{{ '<|' + m['role'] + '|>\n\n' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n\n' }}{% endif %}",
    # No system role.
    "no-system": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start>' + m['role'] + '\n' + m['content'] | trim + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}",
}

ANSWERS = {
    "plain": "The sea keeps no promises.",
    "trailing space": "The sea. ",
    "newlines around": "\n\nThe sea.\n\n",
    "leading space": " The sea.",
    "one token": "a",
    "repeats the question": "What is the sea?",
    "substring of the system prompt": "a pirate",
    "special token": "I say <|im_end|> and go on.",
    "emoji and combining": "Ça va 🏴‍☠️ e\u0301te\u0301",
    "code": "```python\nprint('a  b')\n```",
    "punctuation first": "...well.",
    "double space inside": "one  two   three",
}


@pytest.fixture(scope="module", params=list(TEMPLATES))
def transcriber(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Transcriber:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<start>", "<end>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([*ANSWERS.values(), "You are a pirate at sea. What is the sea?"] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = TEMPLATES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    fast.save_pretrained(folder)
    return Transcriber(str(folder))


def conversation(answer: str, system: str = "You are a pirate at sea.") -> tuple[Message, ...]:
    return (Message("system", system), Message("user", "What is the sea?"), Message("assistant", answer))


@pytest.mark.parametrize("name", list(ANSWERS))
def test_the_span_of_an_imported_answer_decodes_to_the_answer(transcriber: Transcriber, name: str) -> None:
    transcript = transcriber.imported(conversation(ANSWERS[name]))
    assert transcript.refusal is None
    assert transcriber.text(transcript.token_ids[transcript.start : transcript.end]).strip() == ANSWERS[name].strip()
    assert len(transcript.token_ids) == transcript.end
    header = transcriber.text(transcript.token_ids[: transcript.start])
    assert header.rstrip().endswith("assistant") or header.rstrip().endswith("assistant|>")


@pytest.mark.parametrize("answer", ["", "  \n "])
def test_an_empty_answer_is_refused(transcriber: Transcriber, answer: str) -> None:
    assert transcriber.imported(conversation(answer)).refusal == "empty answer"


def test_think_blocks_are_refused_not_measured(transcriber: Transcriber) -> None:
    assert "think" in (transcriber.imported(conversation("<think>hm</think>Yes.")).refusal or "")


def test_a_generated_think_block_is_refused_not_measured(transcriber: Transcriber) -> None:
    prompt = transcriber.prompt_ids(conversation("")[:-1])
    ids = np.asarray(transcriber.tokenizer("<think>hm</think>Yes.", add_special_tokens=False)["input_ids"], np.int32)
    assert transcriber.generated(prompt, ids)[1].refusal == "answer with a think block"


def test_templates_that_write_the_date_write_the_same_one_every_day(transcriber: Transcriber, tmp_path: Path) -> None:
    transcriber.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    dated = Transcriber(str(tmp_path))
    assert dated.text(dated.prompt_ids([Message("user", "Why?")])) == "26 Jul 2024Why?"


def test_a_template_that_drops_the_system_message_does_not_count_as_taking_it(transcriber: Transcriber, tmp_path: Path) -> None:
    transcriber.tokenizer.save_pretrained(tmp_path)
    template = "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'] + ':' + m['content'] }}{% endif %}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    silent = Transcriber(str(tmp_path))
    assert not silent.has_system_role
    assert silent.text(silent.prompt_ids(conversation("")[:-1])) == "user:You are a pirate at sea.\n\nWhat is the sea?"


def test_a_later_turn_is_found_behind_an_equal_earlier_one(transcriber: Transcriber) -> None:
    first = (Message("user", "What is the sea?"), Message("assistant", "The sea."))
    transcript = transcriber.imported((*first, Message("user", "Again?"), Message("assistant", "The sea.")))
    earlier = transcriber.imported(first)
    assert transcript.start > earlier.end
    assert transcriber.text(transcript.token_ids[transcript.start : transcript.end]) == "The sea."


def test_the_span_of_a_generated_answer_is_where_its_ids_were_put(transcriber: Transcriber) -> None:
    prompt = transcriber.prompt_ids(conversation("")[:-1])
    answer = np.asarray(transcriber.tokenizer("The sea keeps no promises.", add_special_tokens=False)["input_ids"], np.int32)
    text, transcript = transcriber.generated(prompt, answer)
    assert text == "The sea keeps no promises."
    assert (transcript.start, transcript.end) == (len(prompt), len(prompt) + len(answer))
    assert np.array_equal(transcript.token_ids, np.concatenate([prompt, answer]))


def test_white_space_around_a_generated_answer_is_not_pooled(transcriber: Transcriber) -> None:
    prompt = transcriber.prompt_ids(conversation("")[:-1])
    space = np.asarray(transcriber.tokenizer("\n", add_special_tokens=False)["input_ids"], np.int32)
    answer = np.asarray(transcriber.tokenizer("Sea.", add_special_tokens=False)["input_ids"], np.int32)
    _, transcript = transcriber.generated(prompt, np.concatenate([space, answer, space]))
    assert transcriber.text(transcript.token_ids[transcript.start : transcript.end]) == "Sea."
    assert transcriber.generated(prompt, space)[1].refusal == "empty answer"
    assert transcriber.generated(prompt, answer[:0])[1].refusal == "empty answer"


def test_imported_and_generated_agree(transcriber: Transcriber) -> None:
    """The same words, once continued and once read back, are measured over the same tokens."""
    answer = "The sea keeps no promises."
    imported = transcriber.imported(conversation(answer))
    prompt = transcriber.prompt_ids(conversation("")[:-1])
    ids = np.asarray(transcriber.tokenizer(answer, add_special_tokens=False)["input_ids"], np.int32)
    _, generated = transcriber.generated(prompt, ids)
    spans = [transcript.token_ids[transcript.start : transcript.end] for transcript in (imported, generated)]
    assert np.array_equal(*spans)


def test_without_a_system_role_the_instruction_opens_the_users_turn(transcriber: Transcriber) -> None:
    text = transcriber.text(transcriber.prompt_ids(conversation("")[:-1]))
    assert "You are a pirate at sea." in text
    if not transcriber.has_system_role:
        assert "user\nYou are a pirate at sea.\n\nWhat is the sea?" in text


def test_a_model_without_tokenizer_or_template_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer that opens"):
        Transcriber(str(tmp_path))
    tokenizer = Tokenizer(models.BPE())
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no chat template"):
        Transcriber(str(tmp_path))
