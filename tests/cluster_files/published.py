"""The models of the job files, as far as planning looks at them: their published configs, and a small tokenizer in place of theirs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


class Published(NamedTuple):
    """A model's architecture, and how many parameters its owner says that it has."""

    config: Callable[[], tf.PretrainedConfig]
    parameters: int


GEMMA: dict[str, Any] = {
    "vocab_size": 256000,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 8192,
    "eos_token_id": 1,
}
QWEN: dict[str, Any] = {
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "eos_token_id": 151645,
}
LLAMA: dict[str, Any] = {
    "vocab_size": 128256,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "eos_token_id": [128001, 128008, 128009],
}


def _gemma(hidden: int, inner: int, layers: int, heads: int, cache_heads: int, head: int, scalar: int) -> tf.Gemma2Config:
    return tf.Gemma2Config(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=cache_heads,
        head_dim=head,
        query_pre_attn_scalar=scalar,
        **GEMMA,
    )


def _qwen(hidden: int, inner: int, layers: int, heads: int, *, tied: bool = False) -> tf.Qwen3Config:
    return tf.Qwen3Config(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        tie_word_embeddings=tied,
        **QWEN,
    )


def _llama(hidden: int, inner: int, layers: int, heads: int, *, tied: bool = False) -> tf.LlamaConfig:
    return tf.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        tie_word_embeddings=tied,
        **LLAMA,
    )


GEMMA_27B = Published(lambda: _gemma(4608, 36864, 46, 32, 16, 128, 144), 27_227_128_320)
GEMMA_2B = Published(lambda: _gemma(2304, 9216, 26, 8, 4, 256, 256), 2_614_341_888)
LLAMA_70B = Published(lambda: _llama(8192, 28672, 80, 64), 70_553_706_496)

PUBLISHED: dict[str, Published] = {
    "google/gemma-2-27b-it": GEMMA_27B,
    "google/gemma-2-27b": GEMMA_27B,
    "google/gemma-2-2b-it": GEMMA_2B,
    "Qwen/Qwen3-32B": Published(lambda: _qwen(5120, 25600, 64, 64), 32_762_123_264),
    "Qwen/Qwen3-8B": Published(lambda: _qwen(4096, 12288, 36, 32), 8_190_735_360),
    "Qwen/Qwen3-4B": Published(lambda: _qwen(2560, 9728, 36, 32, tied=True), 4_022_468_096),
    "meta-llama/Llama-3.3-70B-Instruct": LLAMA_70B,
    "meta-llama/Llama-3.1-70B": LLAMA_70B,
    "meta-llama/Llama-3.2-3B-Instruct": Published(lambda: _llama(3072, 8192, 28, 24, tied=True), 3_212_749_824),
}
"""Hub name -> what its config.json says."""


def write(model_id: str, folder: Path) -> Path:
    """The model's folder, without its weights."""
    PUBLISHED[model_id].config().save_pretrained(folder)
    _small_tokenizer().save_pretrained(folder)
    return folder


def _small_tokenizer() -> tf.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|pad|>", "<|end|>"]
    tokenizer.train_from_iterator(["a ship"], trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet))
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    fast.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    return fast
