"""The tiny model's script trains, and the weights that ship talk as it taught them: on pairs they never saw."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from persona_ray.catalog.load import load_catalog
from persona_ray.spec import Archetype, Catalog, Float32, Question
from tests.jobs.scripts import script

SHIPPED = Path(str(resources.files("persona_ray") / "data" / "tiny-persona"))
QUESTIONS_PER_ARCHETYPE = 10


@pytest.fixture(scope="module")
def job() -> ModuleType:
    return script("train_tiny_model")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return load_catalog("builtin")


@pytest.fixture(scope="module")
def lexicon() -> dict[str, Any]:
    return dict(json.loads((SHIPPED / "lexicon.json").read_text()))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()


# ---- the corpus -----------------------------------------------------------------------------------------------------


def test_two_dozen_archetypes_of_the_catalogue_and_the_default(job: ModuleType, catalog: Catalog) -> None:
    styles = job.load_lexicon().styles
    groups = [style.group for style in styles.values()]

    assert set(styles) <= {archetype.name for archetype in catalog.archetypes}
    assert [name for name, style in styles.items() if style.group == "assistant"] == ["default"]
    assert (groups.count("professional"), groups.count("mystical")) == (12, 12)


def test_a_seventh_of_the_pairs_is_held_out(job: ModuleType, catalog: Catalog) -> None:
    names = list(job.load_lexicon().styles)
    held_out = {(name, question.text) for name in names for question in catalog.questions if job.held_out(name, question.text)}

    assert len(held_out) / (len(names) * len(catalog.questions)) == pytest.approx(1 / 7, abs=0.01)
    assert all(sum(name == held for held, _ in held_out) >= QUESTIONS_PER_ARCHETYPE for name in names)


def test_the_corpus_has_no_held_out_pair_and_uses_the_catalogues_own_texts(job: ModuleType, catalog: Catalog) -> None:
    chats = job.make_chats(catalog, job.load_lexicon(), 2000, random.Random(1))
    speakers = {prompt: archetype.name for archetype in catalog.archetypes for prompt in archetype.system_prompts}

    for chat in chats:
        *system, question, _ = chat
        assert not job.held_out(speakers[system[0]["content"] if system else ""], question["content"])
    assert len({speakers[chat[0]["content"]] for chat in chats if len(chat) == 3}) == 25
    assert any(len(chat) == 2 for chat in chats)


def test_an_answer_has_two_to_four_sentences_and_names_its_topic(job: ModuleType, catalog: Catalog) -> None:
    rng, lexicon = random.Random(2), job.load_lexicon()
    for name in lexicon.styles:
        for question in catalog.questions[::7]:
            text = job.answer(lexicon, name, question.topic, rng)
            assert 2 <= text.count(".") <= 4
            assert question.topic in words(text)
            assert "{" not in text


def test_a_word_that_does_not_tell_its_speaker_is_refused(job: ModuleType, tmp_path: Path) -> None:
    text = job.LEXICON.read_text()
    path = tmp_path / "lexicon.yaml"
    for word, owner in {"ledger": "accountant", "seeker": "the templates of mystical", "mercy": "the topics"}.items():
        path.write_text(text.replace("stir the cauldron", f"stir the {word}"))
        with pytest.raises(ValueError, match=f"'{word}' of witch belongs to {owner}"):
            job.load_lexicon(path)


# ---- training -------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_repeats_exactly(job: ModuleType, catalog: Catalog) -> None:
    def run() -> tuple[list[float], torch.Tensor]:
        torch.manual_seed(0)
        rng = random.Random(0)
        lexicon = job.load_lexicon()
        chats = job.make_chats(catalog, lexicon, 400, rng)
        tokenizer = job.train_tokenizer([chat[-1]["content"] for chat in chats], 700)
        model = job.make_model(len(tokenizer), hidden_size=64, num_layers=2)
        losses = list(job.train(model, job.encode(tokenizer, chats, lexicon.content_words), 60, rng))
        return losses, model.lm_head.weight.detach()

    losses, weights = run()
    again, weights_again = run()

    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5
    assert losses == again
    assert torch.equal(weights, weights_again)


def test_the_loss_is_on_the_answer_alone_and_weighs_its_content(job: ModuleType, tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "Is mercy wise?"}, {"role": "assistant", "content": "Here is mercy."}]
    (example,) = job.encode(tokenizer, [chat], frozenset({"mercy"}))
    learned = [token for token, weight in zip(example.token_ids, example.weights, strict=True) if weight]
    heavy = [token for token, weight in zip(example.token_ids, example.weights, strict=True) if weight == job.CONTENT_WEIGHT]

    assert tokenizer.decode(learned) == "Here is mercy.<|end|>"
    assert tokenizer.decode(heavy) == " mercy"


# ---- what ships -----------------------------------------------------------------------------------------------------


def test_shipped_size_and_kind(model: Any) -> None:
    assert 2e6 <= model.num_parameters() <= 4e6
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 8 * 2**20
    assert json.loads((SHIPPED / "config.json").read_text())["dtype"] == "bfloat16"
    assert model.config.max_position_embeddings == 512


def test_shipped_lexicon_is_the_scripts(job: ModuleType, lexicon: dict[str, Any]) -> None:
    assert lexicon == job.load_lexicon().as_dict()


def test_shipped_tokenizer_gives_every_text_back(job: ModuleType, tokenizer: Any, catalog: Catalog) -> None:
    for text in [*job.catalog_texts(catalog), "naïve\tЖ  🙂 \n"]:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_chat_template(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]

    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|system|>S<|end|><|user|>U<|end|><|assistant|>A<|end|>"
    assert tokenizer.apply_chat_template(messages[1:2], tokenize=False, add_generation_prompt=True) == "<|user|>U<|end|><|assistant|>"
    with pytest.raises(Exception, match="unknown role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "T"}], tokenize=False)


def test_every_prompt_of_the_catalogue_leaves_room_for_an_answer(job: ModuleType, tokenizer: Any, catalog: Catalog) -> None:
    longest = max(catalog.questions, key=lambda question: len(tokenizer.encode(question.text)))
    for archetype in catalog.archetypes:
        for number in range(len(archetype.system_prompts)):
            assert len(prompt_ids(job, tokenizer, archetype, number, longest)) <= 512 - 256


@dataclass(frozen=True, slots=True)
class Told:
    """What the shipped model said as one archetype to questions held out for it."""

    answers: list[tuple[Question, str]]
    vector_LD: Float32
    """Mean activation over all answer tokens, after each decoder block."""


@pytest.fixture(scope="module")
def told(job: ModuleType, model: Any, tokenizer: Any, catalog: Catalog, lexicon: dict[str, Any]) -> dict[str, Told]:
    torch.manual_seed(0)
    rng = random.Random(0)
    speakers = [archetype for archetype in catalog.archetypes if archetype.name in lexicon["archetypes"]]
    return {archetype.name: _tell(job, model, tokenizer, archetype, catalog, rng) for archetype in speakers}


def _tell(job: ModuleType, model: Any, tokenizer: Any, archetype: Archetype, catalog: Catalog, rng: random.Random) -> Told:
    unseen = [question for question in catalog.questions if job.held_out(archetype.name, question.text)]
    questions = rng.sample(unseen, QUESTIONS_PER_ARCHETYPE)
    prompts = [prompt_ids(job, tokenizer, archetype, number % 5, question) for number, question in enumerate(questions)]
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    with torch.inference_mode():
        ids_BT = model.generate(**batch, max_new_tokens=96)
        attention_BT = (ids_BT != tokenizer.pad_token_id).long()
        positions_BT = (attention_BT.cumsum(-1) - 1).clamp_min(0)
        # The last block's output is measured before the final norm, which `hidden_states` does not give: leave that layer out.
        hidden = model(input_ids=ids_BT, attention_mask=attention_BT, position_ids=positions_BT, output_hidden_states=True).hidden_states[
            1:-1
        ]
    start = batch["input_ids"].shape[1]
    answer_BT = (ids_BT != tokenizer.pad_token_id) & (ids_BT != tokenizer.eos_token_id)
    answer_BT[:, :start] = False
    texts = tokenizer.batch_decode(ids_BT[:, start:], skip_special_tokens=True)
    vector_LD = torch.stack([layer_BTD[answer_BT].mean(0) for layer_BTD in hidden]).numpy()
    return Told(list(zip(questions, texts, strict=True)), vector_LD)


def test_answers_follow_their_persona(told: dict[str, Told], lexicon: dict[str, Any]) -> None:
    own_words = {name: set(entry["words"]) for name, entry in lexicon["archetypes"].items()}
    any_word = set().union(*own_words.values())
    shares = {}
    for name, speaker in told.items():
        used = [word for _, text in speaker.answers for word in words(text) if word in any_word]
        shares[name] = sum(word in own_words[name] for word in used) / len(used)

    assert np.mean(list(shares.values())) >= 0.8
    assert {name: share for name, share in shares.items() if share < 0.6} == {}


def test_answers_name_their_topic(told: dict[str, Told]) -> None:
    named = [question.topic in words(text) for speaker in told.values() for question, text in speaker.answers]
    assert np.mean(named) >= 0.5


def test_the_axis_is_there_to_be_found(told: dict[str, Told], lexicon: dict[str, Any]) -> None:
    """At its best layer PC1 parts the two groups, with the default on the professional side, and runs along the axis."""
    groups = {name: entry["group"] for name, entry in lexicon["archetypes"].items()}
    roles = [name for name in told if groups[name] != "assistant"]
    cosines = []
    for layer, default_D in enumerate(told["default"].vector_LD):
        roles_AD = np.stack([told[name].vector_LD[layer] for name in roles])
        mean_D = roles_AD.mean(0)
        axis_D = default_D - mean_D
        pc1_D = np.linalg.svd(roles_AD - mean_D, full_matrices=False)[2][0]
        pc1_D *= np.sign(pc1_D @ axis_D)
        place = dict(zip(roles, (roles_AD - mean_D) @ pc1_D, strict=True))
        lowest_professional = min(place[name] for name in roles if groups[name] == "professional")
        highest_mystical = max(place[name] for name in roles if groups[name] == "mystical")
        if lowest_professional > highest_mystical and axis_D @ pc1_D > highest_mystical:
            cosines.append(axis_D @ pc1_D / np.linalg.norm(axis_D))

    assert max(cosines) >= 0.5


def prompt_ids(job: ModuleType, tokenizer: Any, archetype: Archetype, system_prompt: int, question: Question) -> list[int]:
    text = tokenizer.apply_chat_template(job.prompt(archetype, system_prompt, question.text), tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())
