"""Settings that every test needs before Ray, transformers or torch are imported."""

from __future__ import annotations

import os
import signal
import uuid
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", RAY_USAGE_STATS_ENABLED="0")
os.environ.setdefault("RAY_AUTH_TOKEN", uuid.uuid4().hex)  # else Ray leaves a token file in the home directory

# Whoever is started in the background ignores Ctrl-C, and so would the programs that are tested, which inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The machines are shared: a slow example says nothing about the code.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")


def pytest_report_header(config: pytest.Config) -> str:
    """What decides which tests can run."""
    return f"conformance data: {os.environ.get('PERSONA_RAY_CONFORMANCE') or 'not given'}"


WORDS = [
    "the",
    "sea",
    "keeps",
    "no",
    "promises",
    "and",
    "a",
    "pirate",
    "knows",
    "why",
    "you",
    "are",
    "a",
    "bard",
    "who",
    "sings",
    "of",
    "rain",
    "what",
    "is",
    "time",
    "to",
    "be",
    "plain",
]


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights with four layers, its own tokenizer and a chat template; token 1 ends an answer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(1)
    torch.manual_seed(1)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([" ".join(WORDS)], trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    fast.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("chat-model")
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default Assistant and three characters, two system prompts each, four questions."""
    import yaml

    archetypes = {
        name: {"description": f"A {name} for tests.", "system_prompts": [f"You are a {name}.", f"The {name} knows the sea."]}
        for name in ("pirate", "bard", "ghost")
    }
    default = {"description": "The Assistant.", "system_prompts": ["", "You are plain."], "default": True}
    questions = ["What is time?", "Why the rain?", "What is the sea to you?", "Who keeps a promise?"]
    file = tmp_path_factory.mktemp("catalog") / "catalog.yaml"
    file.write_text(yaml.safe_dump({"archetypes": {"default": default, **archetypes}, "questions": questions}))
    return file
