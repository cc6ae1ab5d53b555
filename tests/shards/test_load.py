"""Loading a stage: its own weights, all of them, or an error in words."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config

from persona_ray.config import ModelConfig
from persona_ray.errors import InputError, IntegrityError
from persona_ray.shards.cut import cut_layers, layers_to_capture
from persona_ray.shards.load import PassThrough, load_stage
from persona_ray.shards.source import choose_attention, model_facts, model_location


def load(folder: Path, first: int, end: int) -> torch.nn.Module:
    return load_stage(str(folder), first, end, revision=None, dtype="float32", attention="sdpa", device="cpu")


def test_a_stage_holds_its_own_weights_and_no_others(llama_folder: Path) -> None:
    whole = load_file(llama_folder / "model.safetensors")
    for first, end in cut_layers(5, 3):
        stage = load(llama_folder, first, end)
        weights = stage.state_dict()
        layers = {int(name.split(".")[2]) for name in weights if name.startswith("model.layers.")}
        assert layers == set(range(first, end))
        assert ("model.embed_tokens.weight" in weights) == (first == 0)
        assert ("lm_head.weight" in weights) == (end == 5)
        assert all(torch.equal(weights[name], whole[name]) for name in weights)
        assert sum(isinstance(module, PassThrough) for module in stage.modules()) >= 5 - (end - first)


def test_a_missing_weight_is_never_left_random(llama_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(llama_folder, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    load(tmp_path / "model", 0, 3)  # not this stage's
    with pytest.raises(IntegrityError, match=r"layers \[3, 5\).*model\.layers\.3\.mlp\.up_proj\.weight"):
        load(tmp_path / "model", 3, 5)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_weights_that_cannot_be_read_are_said_in_one_line(llama_folder: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(llama_folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="its weights cannot be read") as refused:
        load(tmp_path / "model", 0, 5)
    assert "\n" not in str(refused.value)


def test_a_model_of_another_shape_is_said_in_words(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match=r"GPT2LMHeadModel cannot be cut into stages: .* transformer\.layers"):
        load(tmp_path / "gpt2", 0, 2)
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(InputError, match="T5Config has no causal language model"):
        load(tmp_path / "t5", 0, 2)


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_tied_weights_reach_the_stages_that_need_them(tmp_path: Path, num_stages: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, tie_word_embeddings=True
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    embedding = model.get_input_embeddings().weight
    for first, end in cut_layers(3, num_stages):
        stage = load(tmp_path, first, end)
        if first == 0:
            assert torch.equal(stage.get_input_embeddings().weight, embedding)
        if end == 3:
            assert torch.equal(stage.get_output_embeddings().weight, embedding)


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "cuts"), [(5, 2, ((0, 3), (3, 5))), (6, 3, ((0, 2), (2, 4), (4, 6))), (1, 1, ((0, 1),))]
)
def test_cuts_are_even_and_whole(num_layers: int, num_stages: int, cuts: tuple[tuple[int, int], ...]) -> None:
    assert cut_layers(num_layers, num_stages) == cuts


def test_impossible_cuts_and_layers_are_refused() -> None:
    with pytest.raises(InputError, match="4 stages for 3 layers"):
        cut_layers(3, 4)
    with pytest.raises(InputError, match="layers 0 to 2"):
        layers_to_capture(3, [0, 3])
    with pytest.raises(InputError, match="an empty list"):
        layers_to_capture(3, [])
    assert layers_to_capture(5, [3, 1, 3]) == (1, 3)


def test_the_models_own_attention_comes_first() -> None:
    plain, softcapped = LlamaConfig(), LlamaConfig(attn_logit_softcapping=50.0)
    assert choose_attention(plain, "auto") == "sdpa"
    assert choose_attention(softcapped, "auto") == "eager"
    assert choose_attention(plain, "eager") == "eager"
    with pytest.raises(InputError, match="drops this model's attention softcap"):
        choose_attention(softcapped, "sdpa")


def test_facts_come_from_the_models_own_files(llama_folder: Path, tmp_path: Path) -> None:
    facts = model_facts(ModelConfig(id=str(llama_folder)))
    assert (facts.num_layers, facts.hidden_size, facts.stop_ids, facts.revision) == (5, 64, (1,), None)
    shutil.copytree(llama_folder, tmp_path / "elsewhere")
    assert model_facts(ModelConfig(id=str(tmp_path / "elsewhere"))).config_digest == facts.config_digest
    (tmp_path / "elsewhere" / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert model_facts(ModelConfig(id=str(tmp_path / "elsewhere"))).stop_ids == (1, 7, 9)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json in it"):
        model_location(str(tmp_path))
    assert model_location("org/name") == "org/name"
