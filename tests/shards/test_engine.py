"""Sharded = unsharded = plain transformers, for capture and for generation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from persona_ray.errors import IntegrityError
from persona_ray.shards.cut import cut_layers
from persona_ray.shards.engine import LocalLink, ShardEngine, batches_by_length, check_captured
from persona_ray.shards.stage import Stage, StageSpec
from persona_ray.spec import FinishReason, GenerationRequest, Sampling, Spans

NUM_LAYERS, VOCABULARY, STOP_ID = 5, 211, 1
GREEDY = Sampling(max_new_tokens=24, temperature=0)
SAMPLED = Sampling(max_new_tokens=24, temperature=1.3, top_p=0.9, seed=3)


def engine_of(
    folder: Path,
    num_stages: int,
    *,
    batch_tokens: int = 300,
    captured: tuple[int, ...] = tuple(range(NUM_LAYERS)),
    dtype: str = "float32",
) -> ShardEngine:
    links = [
        LocalLink(
            Stage(
                StageSpec(
                    location=str(folder),
                    revision=None,
                    dtype=dtype,
                    attention="sdpa",
                    first_layer=first,
                    end_layer=end,
                    num_layers=NUM_LAYERS,
                    captured=captured,
                    device="cpu",
                )
            )
        )
        for first, end in cut_layers(NUM_LAYERS, num_stages)
    ]
    return ShardEngine(links, num_captured=len(captured), batch_tokens=batch_tokens, stop_ids=[STOP_ID], made={})


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, VOCABULARY, rng.integers(3, 20)).astype(np.int32) for _ in range(9)]


@pytest.fixture(scope="module")
def requests_(prompts: list[np.ndarray]) -> list[GenerationRequest]:
    return [GenerationRequest(f"row {i}", prompt) for i, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def spans(prompts: list[np.ndarray]) -> list[Spans]:
    return [Spans(prompt, 1, len(prompt)) for prompt in prompts]


@pytest.fixture(scope="module")
def unsharded(llama_folder: Path) -> ShardEngine:
    return engine_of(llama_folder, 1)


def test_capture_equals_plain_transformers(llama_folder: Path, unsharded: ShardEngine, spans: list[Spans]) -> None:
    model = LlamaForCausalLM.from_pretrained(llama_folder, dtype=torch.float32).eval()
    outputs: dict[int, torch.Tensor] = {}
    for layer, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda _m, _a, out, layer=layer: outputs.__setitem__(layer, out[0] if isinstance(out, tuple) else out))
    captured = unsharded.capture(spans)
    assert captured.shape == (len(spans), NUM_LAYERS, 64)
    assert captured.dtype == np.float32
    for row_LD, span in zip(captured, spans, strict=True):
        with torch.no_grad():
            model(torch.tensor(span.token_ids[None].astype(np.int64)))
        for layer in range(NUM_LAYERS):
            expected = outputs[layer].reshape(len(span.token_ids), 64)[span.start : span.end].mean(0).numpy()
            assert np.linalg.norm(row_LD[layer] - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("num_stages", [2, 3, 5])
def test_stages_are_bit_equal_to_one(llama_folder: Path, unsharded: ShardEngine, spans: list[Spans], num_stages: int) -> None:
    assert np.array_equal(engine_of(llama_folder, num_stages).capture(spans), unsharded.capture(spans))


def test_bfloat16_stages_are_bit_equal_to_one_and_near_float32(llama_folder: Path, unsharded: ShardEngine, spans: list[Spans]) -> None:
    one, two = (engine_of(llama_folder, num_stages, dtype="bfloat16").capture(spans) for num_stages in (1, 2))
    assert np.array_equal(one, two)
    exact = unsharded.capture(spans)
    error = np.linalg.norm(two - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert 0 < error.max() <= 1.5e-2


def test_captured_layers_are_those_asked_for(llama_folder: Path, unsharded: ShardEngine, spans: list[Spans]) -> None:
    some = engine_of(llama_folder, 2, captured=(1, 4)).capture(spans)
    assert np.array_equal(some, unsharded.capture(spans)[:, [1, 4]])


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_greedy_generation_equals_transformers_generate(llama_folder: Path, requests_: list[GenerationRequest], num_stages: int) -> None:
    model = LlamaForCausalLM.from_pretrained(llama_folder, dtype=torch.float32).eval()
    answers = engine_of(llama_folder, num_stages).generate(requests_, GREEDY)
    for request, answer in zip(requests_, answers, strict=True):
        prompt = torch.tensor(request.prompt_ids[None].astype(np.int64))
        expected = model.generate(prompt, do_sample=False, max_new_tokens=GREEDY.max_new_tokens, pad_token_id=0)[
            0, prompt.shape[1] :
        ].tolist()
        stopped = expected[-1] == STOP_ID
        assert answer.answer_ids.tolist() == (expected[:-1] if stopped else expected)
        assert answer.finish_reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)


def test_a_sampled_answer_depends_on_its_stream_alone(
    llama_folder: Path, unsharded: ShardEngine, requests_: list[GenerationRequest]
) -> None:
    together = unsharded.generate(requests_, SAMPLED)
    sharded = engine_of(llama_folder, 3).generate(requests_, SAMPLED)
    alone = [unsharded.generate([request], SAMPLED)[0] for request in requests_]
    backwards = unsharded.generate(requests_[::-1], SAMPLED)[::-1]
    other_seed = unsharded.generate(requests_, Sampling(max_new_tokens=24, temperature=1.3, top_p=0.9, seed=4))
    expected = [answer.answer_ids.tolist() for answer in together]
    assert [a.answer_ids.tolist() for a in sharded] == expected
    assert [a.answer_ids.tolist() for a in alone] == expected
    assert [a.answer_ids.tolist() for a in backwards] == expected
    assert [a.answer_ids.tolist() for a in other_seed] != expected


def test_finished_sequences_leave_the_batch_and_change_nothing(llama_folder: Path, requests_: list[GenerationRequest]) -> None:
    """With many stop tokens answers end at different steps; each must still be what it is alone."""
    engine = engine_of(llama_folder, 2)
    engine._stop_ids = np.arange(1, VOCABULARY, 5)
    together = engine.generate(requests_, SAMPLED)
    assert len({len(answer.answer_ids) for answer in together}) > 2
    for request, answer in zip(requests_, together, strict=True):
        assert engine.generate([request], SAMPLED)[0].answer_ids.tolist() == answer.answer_ids.tolist()


def test_nothing_stays_in_the_caches(unsharded: ShardEngine, requests_: list[GenerationRequest]) -> None:
    unsharded.generate(requests_, GREEDY)
    assert all(not link.stage._caches for link in unsharded._links if isinstance(link, LocalLink))


class Push:
    """Adds a constant after one block."""

    def __init__(self, layer: int, amount: float) -> None:
        self.layer, self.amount = layer, amount

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.amount


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_edits_act_on_their_layer_in_any_cut(
    llama_folder: Path, unsharded: ShardEngine, requests_: list[GenerationRequest], layer: int
) -> None:
    def ids(engine: ShardEngine, amount: float) -> list[list[int]]:
        return [answer.answer_ids.tolist() for answer in engine.generate(requests_, SAMPLED, [Push(layer, amount)])]

    plain = [answer.answer_ids.tolist() for answer in unsharded.generate(requests_, SAMPLED)]
    assert ids(unsharded, 0.0) == plain
    assert ids(unsharded, 0.7) != plain
    assert ids(engine_of(llama_folder, 3), 0.7) == ids(unsharded, 0.7)


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40), budget=st.integers(1, 400))
def test_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = list(batches_by_length(lengths, budget))
    assert sorted(position for batch in batches for position in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[position] for position in batch) <= budget


def test_wrong_captures_stop_the_run() -> None:
    good = np.random.default_rng(0).standard_normal((3, 2, 4)).astype(np.float32)
    check_captured(good, 3)
    with pytest.raises(IntegrityError, match="a hook did not fire"):
        check_captured(good[:2], 3)
    with pytest.raises(IntegrityError, match="all zero"):
        check_captured(np.concatenate([good[:2], np.zeros((1, 2, 4), np.float32)]), 3)
    with pytest.raises(IntegrityError, match="passed through"):
        check_captured(good[[0, 1, 1]], 3)
