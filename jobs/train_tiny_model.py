"""Trains the tiny persona model that ships with the package, from nothing but the catalogue and tiny_model/lexicon.yaml.

    python jobs/train_tiny_model.py --out persona_ray/data/tiny-persona

A Llama of 2.8 million parameters with a byte-level BPE tokenizer of its own. Its corpus is made here: the default
Assistant, twelve professional and twelve mystical archetypes of the catalogue answer the catalogue's questions under
their own system prompts, each with its own lexicon in the sentence templates of its group. Professionals take part of
their sentences from the Assistant and the Assistant some from them, so that there is one direction to be found which
runs from the mystical characters over the professionals to the Assistant.

It imitates a style of speech and knows nothing else. One thread, a number of steps and a seed: the same machine and
library versions give the same weights again. A seventh of all pairs of archetype and question is held out.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from persona_ray.catalog.load import load_catalog
from persona_ray.spec import Archetype, Catalog

Chat = Sequence[Mapping[str, str]]
"""Messages as chat templates take them; in the corpus the last one is the answer."""

_WORD = re.compile(r"[a-z']+")

LEXICON = Path(__file__).parent / "tiny_model" / "lexicon.yaml"

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('unknown role ' + message['role']) -}}
{%- endif -%}
{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""

DEFAULT_SHARE = 0.15
"""Of all chats, those of the default Assistant."""
SLIPS, STAYS = 0.1, 0.85
"""Chance that a sentence slips out of character, to the other side, and that the next one stays there: a mystical
character speaks as the Assistant, anybody else as some mystical character. Sampling seldom shows it. Without it only the
system prompt would say who speaks, and no push on what was said so far would change that."""
BORROWED_BY_PROFESSIONALS = 0.5
"""Of a professional's sentences, those in one of the Assistant's templates ..."""
BORROWED_WITH_WORDS = 0.2
"""... and of these the ones that use the Assistant's words too."""
BORROWED_BY_ASSISTANT = 0.5
"""Of the Assistant's sentences, those in a professional template."""

BATCH_CHATS = 8
PEAK_LEARNING_RATE = 2e-3
WARM_UP_STEPS = 40
CONTENT_WEIGHT = 3.0
"""Of topics and lexicon words in the loss; other tokens of an answer count 1. Who speaks of what is learned last: this halves the time."""


@dataclass(frozen=True, slots=True)
class Style:
    """How one archetype talks."""

    group: str
    acts: tuple[str, ...]
    things: tuple[str, ...]
    words: frozenset[str]
    """Its lexicon: lower-case words that no other archetype, template or topic has."""


@dataclass(frozen=True, slots=True)
class Lexicon:
    """tiny_model/lexicon.yaml, checked."""

    templates: Mapping[str, tuple[str, ...]]
    shared: Mapping[str, tuple[str, ...]]
    styles: Mapping[str, Style]
    topics: Mapping[str, str]
    """Topic -> noun phrase."""

    @property
    def content_words(self) -> frozenset[str]:
        """What an answer is about and who gives it: topics and everybody's own words."""
        return frozenset(self.topics).union(*(style.words for style in self.styles.values()))

    def as_dict(self) -> dict[str, Any]:
        """What ships as lexicon.json: whose word is whose."""
        return {
            "archetypes": {name: {"group": style.group, "words": sorted(style.words)} for name, style in self.styles.items()},
            "groups": {group: sorted(words) for group, words in self.shared.items()},
            "assistant_side": ["assistant", "professional"],
        }


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised chat, with the weight of each token in the loss: 0 before the answer."""

    token_ids: tuple[int, ...]
    weights: tuple[float, ...]


def held_out(archetype: str, question: str) -> bool:
    """Whether training never sees this archetype answer this question: one pair in seven, by CRC-32 of both texts."""
    return zlib.crc32(f"{archetype}/{question}".encode()) % 7 == 0


# ---- corpus ---------------------------------------------------------------------------------------------------------


def load_lexicon(path: Path = LEXICON) -> Lexicon:
    """The words to train on. Raises ValueError where a word would not tell its speaker."""
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    common = set(document["common"])
    styles = {
        name: Style(
            entry["group"], tuple(entry["acts"]), tuple(entry["things"]), frozenset(_words(*entry["acts"], *entry["things"]) - common)
        )
        for name, entry in document["archetypes"].items()
    }
    lexicon = Lexicon(
        templates={group: tuple(entry["templates"]) for group, entry in document["groups"].items()},
        shared={group: tuple(entry["shared"]) for group, entry in document["groups"].items()},
        styles=styles,
        topics={topic: phrase for article, topics in document["topics"].items() for topic, phrase in _noun_phrases(article, topics)},
    )
    _refuse_ambiguous_words(lexicon)
    return lexicon


def answer(lexicon: Lexicon, archetype: str, topic: str, rng: random.Random) -> str:
    """Two to four sentences in the archetype's style, at least one of them about `topic`."""
    count = rng.choice((2, 3, 3, 4))
    while True:
        frames = _frames(lexicon, archetype, count, rng)
        if any("{topic}" in template for template, _ in frames):
            return " ".join(_fill(template, style, lexicon, topic, rng) for template, style in frames)


def make_chats(catalog: Catalog, lexicon: Lexicon, count: int, rng: random.Random) -> list[Chat]:
    """`count` conversations, none of a held-out pair."""
    speakers = {archetype.name: archetype for archetype in catalog.archetypes if archetype.name in lexicon.styles}
    roles = [archetype for archetype in speakers.values() if not archetype.is_default]
    default = next(archetype for archetype in speakers.values() if archetype.is_default)
    chats: list[Chat] = []
    while len(chats) < count:
        archetype = default if rng.random() < DEFAULT_SHARE else rng.choice(roles)
        question = rng.choice(catalog.questions)
        if not held_out(archetype.name, question.text):
            reply = {"role": "assistant", "content": answer(lexicon, archetype.name, question.topic, rng)}
            asked = prompt(archetype, rng.randrange(len(archetype.system_prompts)), question.text)
            chats.append([*asked, reply])
    return chats


def prompt(archetype: Archetype, system_prompt: int, question: str) -> list[dict[str, str]]:
    """The messages before the answer; an empty system prompt is no message."""
    system = archetype.system_prompts[system_prompt]
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": question}]


def _frames(lexicon: Lexicon, archetype: str, count: int, rng: random.Random) -> list[tuple[str, Style]]:
    """`count` different templates, each with the style that fills it."""
    other_side = "default" if lexicon.styles[archetype].group == "mystical" else rng.choice(_members(lexicon, "mystical"))
    frames: dict[str, Style] = {}
    slipped = False
    while len(frames) < count:
        slipped = rng.random() < (STAYS if slipped else SLIPS)
        group, speaker = _manner(lexicon, other_side if slipped else archetype, rng)
        frames.setdefault(rng.choice(lexicon.templates[group]), lexicon.styles[speaker])
    return list(frames.items())


def _manner(lexicon: Lexicon, archetype: str, rng: random.Random) -> tuple[str, str]:
    """Whose templates and whose words one sentence takes: (group, archetype)."""
    own = lexicon.styles[archetype].group
    if own == "professional" and rng.random() < BORROWED_BY_PROFESSIONALS:
        return "assistant", "default" if rng.random() < BORROWED_WITH_WORDS else archetype
    if own == "assistant" and rng.random() < BORROWED_BY_ASSISTANT:
        return "professional", archetype
    return own, archetype


def _members(lexicon: Lexicon, group: str) -> list[str]:
    return [name for name, style in lexicon.styles.items() if style.group == group]


def _fill(template: str, style: Style, lexicon: Lexicon, topic: str, rng: random.Random) -> str:
    sentence = template.format(
        topic=lexicon.topics[topic],
        act=rng.choice(style.acts),
        thing=rng.choice(style.things),
        shared=rng.choice(lexicon.shared[style.group]),
    )
    return sentence[0].upper() + sentence[1:]


def _noun_phrases(article: str, topics: Sequence[str]) -> Iterator[tuple[str, str]]:
    for topic in topics:
        spoken = {"none": "", "the": "the ", "a": "an " if topic[0] in "aeiou" else "a "}[article]
        yield topic, spoken + topic


def _words(*texts: str) -> set[str]:
    return {word for text in texts for word in _WORD.findall(text.lower())}


def _refuse_ambiguous_words(lexicon: Lexicon) -> None:
    owner: dict[str, str] = {}
    for group, templates in lexicon.templates.items():
        plain = (re.sub(r"\{\w+\}", "", template) for template in templates)
        owner |= dict.fromkeys(_words(*plain, *lexicon.shared[group]), f"the templates of {group}")
    content = {"the topics": lexicon.topics} | {name: sorted(style.words) for name, style in lexicon.styles.items()}
    for name, words in content.items():
        for word in words:
            if word in owner:
                raise ValueError(f"{LEXICON.name}: {word!r} of {name} belongs to {owner[word]} already; choose another word")
            owner[word] = name


# ---- tokenizer ------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: what it decodes is what it encoded, for any text."""
    special = [PAD, END, *(f"<|{role}|>" for role in ROLES)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=special[2:],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        padding_side="left",
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def catalog_texts(catalog: Catalog) -> list[str]:
    """Every text that a prompt can hold."""
    prompts = [text for archetype in catalog.archetypes for text in archetype.system_prompts]
    return prompts + [question.text for question in catalog.questions]


def encode(tokenizer: PreTrainedTokenizerFast, chats: Sequence[Chat], content_words: frozenset[str]) -> list[Example]:
    """The chats as token ids; the answer and its end-of-turn token are what is learned."""
    return [_encode(tokenizer, chat, content_words) for chat in chats]


def _encode(tokenizer: PreTrainedTokenizerFast, chat: Chat, content_words: frozenset[str]) -> Example:
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    asked = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    content = [match.span() for match in _WORD.finditer(text.lower(), len(asked)) if match[0] in content_words]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)

    def weight(start: int, end: int) -> float:
        if start < len(asked):
            return 0.0
        return CONTENT_WEIGHT if any(start < last and first < end for first, last in content) else 1.0

    return Example(tuple(encoded["input_ids"]), tuple(weight(start, end) for start, end in encoded["offset_mapping"]))


# ---- training -------------------------------------------------------------------------------------------------------


def make_model(vocab_size: int, hidden_size: int = 192, num_layers: int = 5) -> LlamaForCausalLM:
    """A Llama with random weights; seed torch before."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=hidden_size * 8 // 3,
            num_hidden_layers=num_layers,
            num_attention_heads=hidden_size // 32,
            num_key_value_heads=hidden_size // 64,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )


def train(model: LlamaForCausalLM, examples: Sequence[Example], steps: int, rng: random.Random) -> Iterator[float]:
    """Trains `model` in place; yields the weighted loss of each step, nats a token."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    model.train()
    for step, batch in zip(range(steps), _batches(examples, rng), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, steps)
        loss = _answer_loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.item()
    model.eval()


def _learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * (0.05 + 0.95 * cosine)


def _batches(examples: Sequence[Example], rng: random.Random) -> Iterator[list[Example]]:
    """Batches of chats of about one length, without end: a window of fifty batches is sorted, cut and shuffled."""
    window = BATCH_CHATS * 50
    while True:
        order = rng.sample(examples, len(examples))
        for start in range(0, len(order), window):
            near = sorted(order[start : start + window], key=lambda example: len(example.token_ids))
            batches = [near[i : i + BATCH_CHATS] for i in range(0, len(near), BATCH_CHATS)]
            rng.shuffle(batches)
            yield from batches


def _answer_loss(model: LlamaForCausalLM, batch: Sequence[Example]) -> Tensor:
    """Weighted cross entropy of the answers' tokens. Padding stands on the right, where causal attention never looks."""
    ids_BT = pad_sequence([torch.tensor(example.token_ids) for example in batch], batch_first=True)
    weights_BT = pad_sequence([torch.tensor(example.weights) for example in batch], batch_first=True)
    learned_BT = weights_BT[:, 1:] > 0
    hidden_BTD = model.model(input_ids=ids_BT[:, :-1], use_cache=False).last_hidden_state
    losses_N = torch.nn.functional.cross_entropy(model.lm_head(hidden_BTD[learned_BT]), ids_BT[:, 1:][learned_BT], reduction="none")
    weights_N = weights_BT[:, 1:][learned_BT]
    return (losses_N * weights_N).sum() / weights_N.sum()


# ---- the whole ------------------------------------------------------------------------------------------------------


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, lexicon: Lexicon, out: Path) -> None:
    """Weights in bfloat16, configuration, tokenizer and lexicon.json, all below `out`."""
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=128, pad_token_id=0, eos_token_id=1
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "lexicon.json").write_text(json.dumps(lexicon.as_dict(), indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the tiny persona model.")
    parser.add_argument("--out", type=Path, default=Path("tiny-persona"), help="folder to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1800, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--chats", type=int, default=20_000, help="chats in the corpus (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens of the tokenizer (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of corpus, weights and batches (default: %(default)s)")
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    catalog, lexicon = load_catalog("builtin"), load_lexicon()
    chats = make_chats(catalog, lexicon, options.chats, rng)
    tokenizer = train_tokenizer(catalog_texts(catalog) + [chat[-1]["content"] for chat in chats], options.vocab_size)
    examples = encode(tokenizer, chats, lexicon.content_words)
    model = make_model(len(tokenizer))
    print(
        f"{len(chats)} chats, {sum(len(example.token_ids) for example in examples)} tokens, {model.num_parameters()} parameters", flush=True
    )

    begun = time.process_time()
    for step, loss in enumerate(train(model, examples, options.steps, rng), start=1):
        if step % 50 == 0 or step == options.steps:
            print(f"step {step} of {options.steps}: loss {loss:.3f}, {time.process_time() - begun:.0f} CPU seconds", flush=True)
    save(model, tokenizer, lexicon, options.out)
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
