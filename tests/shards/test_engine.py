"""Sharded = unsharded = plain transformers, for capture and for generation."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from persona_ray.errors import IntegrityError, RetryableError
from persona_ray.metrics import BATCH_SECONDS, PADDING_TOKENS, STAGE_BUSY_SECONDS, TOKENS, recorded_by
from persona_ray.shards.cut import cut_layers
from persona_ray.shards.engine import ShardEngine, check_captured
from persona_ray.shards.link import LocalLink
from persona_ray.shards.plan import ReplicaSpec, StageSpec, plan_stages
from persona_ray.shards.stage import Stage
from persona_ray.spec import FinishReason, GenerationRequest, Sampling, Spans
from tests.recording import Records

NUM_LAYERS, VOCABULARY, STOP_ID = 5, 211, 1
GREEDY = Sampling(max_new_tokens=24, temperature=0)
SAMPLED = Sampling(max_new_tokens=24, temperature=1.3, top_p=0.9, seed=3)


def engine_of(
    folder: Path,
    num_stages: int,
    *,
    batch_tokens: int = 300,
    decode_tokens: int = 300,
    stop_ids: tuple[int, ...] = (STOP_ID,),
    captured: tuple[int, ...] = tuple(range(NUM_LAYERS)),
    dtype: str = "float32",
    end_layer: int = NUM_LAYERS,
    generates: bool = True,
) -> ShardEngine:
    whole = StageSpec(
        location=str(folder),
        revision=None,
        dtype=dtype,
        attention="sdpa",
        first_layer=0,
        end_layer=NUM_LAYERS,
        num_layers=NUM_LAYERS,
        captured=captured,
        device="cpu",
        generates=generates,
    )
    spec = ReplicaSpec(
        stages=plan_stages(whole, cut_layers(end_layer, num_stages)),
        batch_tokens=batch_tokens,
        decode_tokens=decode_tokens,
        step_cost_tokens=4,
        stop_ids=stop_ids,
        gpus_per_shard=0,
        accelerator=None,
        shard_bytes=0,
        transport="object-store",
    )
    return ShardEngine([LocalLink(Stage(stage)) for stage in spec.stages], spec, made={})


def means(engine: ShardEngine, spans: list[Spans]) -> np.ndarray:
    return engine.capture(spans).means_RLD


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
    captured = means(unsharded, spans)
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
    assert np.array_equal(means(engine_of(llama_folder, num_stages), spans), means(unsharded, spans))


def test_bfloat16_stages_are_bit_equal_to_one_and_near_float32(llama_folder: Path, unsharded: ShardEngine, spans: list[Spans]) -> None:
    one, two = (means(engine_of(llama_folder, num_stages, dtype="bfloat16"), spans) for num_stages in (1, 2))
    assert np.array_equal(one, two)
    exact = means(unsharded, spans)
    error = np.linalg.norm(two - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert 0 < error.max() <= 1.5e-2


def test_captured_layers_are_those_asked_for(llama_folder: Path, unsharded: ShardEngine, spans: list[Spans]) -> None:
    some = means(engine_of(llama_folder, 2, captured=(1, 4)), spans)
    assert np.array_equal(some, means(unsharded, spans)[:, [1, 4]])


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
    engine = engine_of(llama_folder, 2, stop_ids=tuple(range(1, VOCABULARY, 5)))
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


def test_wrong_captures_stop_the_run() -> None:
    good = np.random.default_rng(0).standard_normal((3, 2, 4)).astype(np.float32)
    check_captured(good, [0, 1, 5])
    with pytest.raises(IntegrityError, match="a hook did not fire"):
        check_captured(good[:2], [0, 1, 5])
    with pytest.raises(IntegrityError, match="layer 5 is all zero"):
        check_captured(np.concatenate([good[:2], np.zeros((1, 2, 4), np.float32)]), [0, 1, 5])
    with pytest.raises(IntegrityError, match=r"layers 1 and 5 are equal.*passed through"):
        check_captured(good[[0, 1, 1]], [0, 1, 5])


# ---- memory ------------------------------------------------------------------------------------------------------------


class Narrow:
    """A device that fits `tokens` padded tokens: larger forwards end in the out-of-memory error of torch, inside a block."""

    def __init__(self, engine: ShardEngine, layer: int, tokens: int) -> None:
        self.tokens, self.num_failures = tokens, 0
        for link in engine._links:
            assert isinstance(link, LocalLink)
            if link.stage.spec.first_layer <= layer < link.stage.spec.end_layer:
                link.stage.base.layers[layer].mlp.register_forward_pre_hook(self.check)

    def check(self, _module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].shape[0] * inputs[0].shape[1] > self.tokens:
            self.num_failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.parametrize(("num_stages", "layer"), [(1, 2), (3, 0), (3, 4)])
def test_a_batch_that_does_not_fit_is_halved_noted_and_remembered(
    llama_folder: Path, unsharded: ShardEngine, spans: list[Spans], num_stages: int, layer: int
) -> None:
    engine = engine_of(llama_folder, num_stages)
    device = Narrow(engine, layer, tokens=45)
    first = engine.capture(spans)
    assert np.allclose(first.means_RLD, means(unsharded, spans), rtol=1e-4, atol=1e-6)
    assert device.num_failures > 0
    assert "out of memory" in first.notes[0]
    failures_before = device.num_failures
    again = engine.capture(spans)
    assert np.array_equal(again.means_RLD, first.means_RLD), "halving follows a fixed rule"
    assert device.num_failures == failures_before, "what did not fit once is not tried again"
    assert again.notes, "rows of smaller batches carry the note, too"
    assert not unsharded.capture(spans).notes


def test_answers_do_not_depend_on_memory(llama_folder: Path, unsharded: ShardEngine, requests_: list[GenerationRequest]) -> None:
    engine = engine_of(llama_folder, 2)
    device = Narrow(engine, 3, tokens=50)
    answers = engine.generate(requests_, SAMPLED)
    assert device.num_failures > 0
    assert [a.answer_ids.tolist() for a in answers] == [a.answer_ids.tolist() for a in unsharded.generate(requests_, SAMPLED)]
    assert all(not link.stage._caches for link in engine._links if isinstance(link, LocalLink))
    failures_before = device.num_failures
    assert engine.generate(requests_, SAMPLED)
    assert device.num_failures == failures_before, "what did not fit once is not tried again"


def test_a_cache_that_did_not_fit_says_nothing_about_capture(
    llama_folder: Path, unsharded: ShardEngine, spans: list[Spans], requests_: list[GenerationRequest]
) -> None:
    engine = engine_of(llama_folder, 2)
    device = Narrow(engine, 3, tokens=50)
    engine.generate(requests_, SAMPLED)
    assert device.num_failures > 0
    device.tokens = 10_000
    captured = engine.capture(spans)
    assert not captured.notes
    assert np.array_equal(captured.means_RLD, means(unsharded, spans))


def test_a_single_row_that_does_not_fit_is_said_with_the_way_out(llama_folder: Path, spans: list[Spans]) -> None:
    engine = engine_of(llama_folder, 2)
    Narrow(engine, 1, tokens=2)
    with pytest.raises(RetryableError, match=r"layers \[0, 3\): a batch of 1 x .* cannot be halved. More stages"):
        engine.capture(spans)
    assert all(engine._capturing._free.acquire(blocking=False) for _ in range(3)), "a failed call gives its places back"


# ---- what is not computed, and what runs beside what -------------------------------------------------------------------


@pytest.mark.parametrize("num_stages", [1, 2, 5])
def test_nothing_after_the_last_captured_layer_is_computed(
    llama_folder: Path, unsharded: ShardEngine, spans: list[Spans], num_stages: int
) -> None:
    engine = engine_of(llama_folder, num_stages, captured=(0, 2))
    ran: set[int] = set()
    for link in engine._links:
        assert isinstance(link, LocalLink)
        for layer in range(link.stage.spec.first_layer, link.stage.spec.end_layer):
            link.stage.base.layers[layer].register_forward_pre_hook(lambda *_, layer=layer: ran.add(layer))
    assert np.array_equal(means(engine, spans), means(unsharded, spans)[:, [0, 2]])
    assert ran == {0, 1, 2}


def test_a_model_that_is_only_read_ends_with_its_last_captured_layer(
    llama_folder: Path, unsharded: ShardEngine, spans: list[Spans]
) -> None:
    engine = engine_of(llama_folder, 2, captured=(0, 2), end_layer=3, generates=False)
    weights = {name for link in engine._links if isinstance(link, LocalLink) for name in link.stage.model.state_dict()}
    assert not [name for name in weights if ".layers.3." in name or ".layers.4." in name or "lm_head" in name]
    assert np.array_equal(means(engine, spans), means(unsharded, spans)[:, [0, 2]])


class Ordered:
    """A stage whose futures are computed when they are asked for; notes how many wait."""

    def __init__(self, link: LocalLink, log: list[int]) -> None:
        self._link, self._log, self._waiting = link, log, 0

    def capture(self, x: Any, start_B: np.ndarray, end_B: np.ndarray) -> tuple[object, object]:
        self._waiting += 1
        self._log.append(self._waiting)
        return self._link.capture(x, start_B, end_B)

    def result(self, future: object) -> Any:
        self._waiting -= 1
        return self._link.result(future)


def test_as_many_batches_are_under_way_as_keep_every_stage_busy_and_no_more(
    llama_folder: Path, unsharded: ShardEngine, spans: list[Spans]
) -> None:
    engine = engine_of(llama_folder, 2, batch_tokens=20)
    waiting: list[int] = []
    links = [Ordered(link, waiting) for link in engine._links if isinstance(link, LocalLink)]
    engine._links = engine._capture_links = tuple(links)  # type: ignore[assignment]
    assert np.allclose(means(engine, spans), means(unsharded, spans), rtol=1e-4, atol=1e-6)
    assert max(waiting) == 3


def test_several_threads_share_one_engine(
    llama_folder: Path, unsharded: ShardEngine, spans: list[Spans], requests_: list[GenerationRequest]
) -> None:
    engine = engine_of(llama_folder, 2, batch_tokens=60, decode_tokens=60)
    expected, answers = means(engine_of(llama_folder, 2, batch_tokens=60), spans), unsharded.generate(requests_, SAMPLED)
    with ThreadPoolExecutor(6) as threads:
        captured = [threads.submit(means, engine, spans) for _ in range(6)]
        generated = [threads.submit(engine.generate, requests_, SAMPLED) for _ in range(6)]
        assert all(np.array_equal(future.result(timeout=60), expected) for future in captured)
        for future in generated:
            assert [a.answer_ids.tolist() for a in future.result(timeout=60)] == [a.answer_ids.tolist() for a in answers]


def test_an_error_comes_out_where_one_waits_and_leaves_nothing_behind(llama_folder: Path, requests_: list[GenerationRequest]) -> None:
    engine = engine_of(llama_folder, 2)

    def fail(*_: object) -> None:
        raise ValueError("broken block")

    link = engine._links[1]
    assert isinstance(link, LocalLink)
    link.stage.base.layers[4].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="broken block"):
        engine.generate(requests_, GREEDY)
    assert all(not link.stage._caches for link in engine._links if isinstance(link, LocalLink))
    assert all(engine._decoding._free.acquire(blocking=False) for _ in range(3))


# ---- what it tells of itself


def test_the_tokens_it_counts_are_those_that_it_computed(llama_folder: Path, requests_: list[GenerationRequest]) -> None:
    engine, records = engine_of(llama_folder, 2), Records()
    with recorded_by(records):
        answers = engine.generate(requests_, SAMPLED)
        spans = [
            Spans(np.concatenate([request.prompt_ids, answer.answer_ids]), 0, len(request.prompt_ids))
            for request, answer in zip(requests_, answers, strict=True)
        ]
        captured = engine.capture(spans)
    read = sum(len(request.prompt_ids) for request in requests_)
    assert sum(records.of(TOKENS, phase="prompt")) == read
    assert sum(records.of(TOKENS, phase="generated")) == sum(len(answer.answer_ids) for answer in answers)
    assert sum(records.of(TOKENS, phase="captured")) == sum(len(rollout.token_ids) for rollout in spans)
    assert sum(records.of(TOKENS, phase="captured")) + sum(records.of(PADDING_TOKENS, phase="captured")) == captured.padded_tokens
    assert len(records.of(BATCH_SECONDS, phase="capture")) == len(records.of(TOKENS, phase="captured")) > 1
    assert min(records.of(BATCH_SECONDS)) > 0
    busy_s = sum(process["busy_s"] for stage in engine.usage() for process in stage)
    assert sum(records.of(STAGE_BUSY_SECONDS)) == pytest.approx(busy_s)
    assert captured.peak_device_bytes is None


class Full(LocalLink):
    """Computes on the CPU, and pretends to a GPU's memory, in two processes."""

    peak_bytes = 1000

    def usage(self) -> list[dict[str, float]]:
        Full.peak_bytes += 1000
        return [{"peak_device_bytes": Full.peak_bytes}, {"peak_device_bytes": 5}]


def test_on_gpus_the_fullest_shard_of_all_stages_tells_its_peak(llama_folder: Path) -> None:
    engine = engine_of(llama_folder, 2)
    stages = tuple(replace(stage, device="cuda") for stage in engine._spec.stages)
    links = [Full(link.stage) for link in engine._links]
    engine = ShardEngine(links, replace(engine._spec, stages=stages), made={})
    assert engine.capture([Spans(np.arange(2, 9, dtype=np.int32), 0, 7)]).peak_device_bytes == 3000
