from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from persona_ray.errors import InputError
from persona_ray.steer.attach import attach
from persona_ray.steer.edit import AddVector, along

WIDTH, LAYERS = 16, 3
AXIS_D = np.random.default_rng(0).standard_normal(WIDTH).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> Iterator[LlamaForCausalLM]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1
    )
    with torch.no_grad():
        yield LlamaForCausalLM(config).eval()


IDS = torch.arange(10)[None]


def hidden_states(model: LlamaForCausalLM) -> tuple[torch.Tensor, ...]:
    return tuple(model(IDS, output_hidden_states=True).hidden_states)


def by_hand(model: LlamaForCausalLM, hidden_BTD: torch.Tensor, first: int) -> torch.Tensor:
    """The rest of the model from block `first` on, on an edited state."""
    positions = torch.arange(IDS.shape[1])[None]
    rotary = model.model.rotary_emb(hidden_BTD, positions)
    mask = torch.full((IDS.shape[1], IDS.shape[1]), -torch.inf).triu(1)[None, None]
    for block in model.model.layers[first:]:
        output = block(hidden_BTD, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        hidden_BTD = output[0] if isinstance(output, tuple) else output
    return model.lm_head(model.model.norm(hidden_BTD))


def test_steering_equals_adding_by_hand(model: LlamaForCausalLM) -> None:
    layer, strength = 1, 2.5
    with torch.no_grad():
        expected = by_hand(model, hidden_states(model)[layer + 1] + strength * torch.tensor(AXIS_D), layer + 1)
        with attach(model.model.layers, [along(AXIS_D, layer, strength)]):
            steered = model(IDS).logits
        torch.testing.assert_close(steered, expected, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(steered, model(IDS).logits, atol=1e-3)


def test_it_also_acts_while_generating_with_a_cache(model: LlamaForCausalLM) -> None:
    edits = [along(AXIS_D, 0, 3.0)]
    with torch.no_grad(), attach(model.model.layers, edits):
        generated = model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
        again = IDS
        for _ in range(4):
            again = torch.cat([again, model(again, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, again)


@torch.no_grad()
def test_strength_zero_is_no_change_bit_by_bit(model: LlamaForCausalLM) -> None:
    plain = model(IDS).logits
    with attach(model.model.layers, [along(AXIS_D, 0, 0.0), along(AXIS_D, 2, 0.0)]):
        assert torch.equal(model(IDS).logits, plain)


@torch.no_grad()
def test_everything_is_removed_also_after_an_error(model: LlamaForCausalLM) -> None:
    plain = model(IDS).logits
    hooks = [len(block._forward_hooks) for block in model.model.layers]
    with attach(model.model.layers, [along(AXIS_D, 1, 1.0)]):
        pass
    assert torch.equal(model(IDS).logits, plain)
    with pytest.raises(RuntimeError, match="on purpose"), attach(model.model.layers, [along(AXIS_D, 1, 1.0)]):
        raise RuntimeError("on purpose")
    assert torch.equal(model(IDS).logits, plain)
    assert [len(block._forward_hooks) for block in model.model.layers] == hooks


class TupleBlock(nn.Module):
    def forward(self, hidden_BTD: torch.Tensor) -> tuple[torch.Tensor, str]:
        return hidden_BTD, "kept"


def test_blocks_that_answer_tuples_keep_the_rest() -> None:
    blocks = nn.ModuleList([TupleBlock()])
    hidden_BTD = torch.zeros(1, 2, WIDTH)
    with attach(blocks, [AddVector(0, AXIS_D), AddVector(0, AXIS_D)]):
        output: Any = blocks[0](hidden_BTD)
    torch.testing.assert_close(output[0], torch.tensor(2 * AXIS_D).expand(1, 2, WIDTH))
    assert output[1] == "kept"


@pytest.mark.parametrize("layer", [-1, LAYERS])
def test_a_layer_that_is_not_there_is_named(model: LlamaForCausalLM, layer: int) -> None:
    with (
        pytest.raises(InputError, match=rf"layer {layer}; this model has layers 0 to {LAYERS - 1}"),
        attach(model.model.layers, [along(AXIS_D, layer, 1.0)]),
    ):
        pass
