"""GPU-seconds from a model's size: what must hold for any model, cut and speed."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_ray.bench.measure import bandwidth_limit_s, capture_flops
from persona_ray.costs.formulas import Rates, Replica, Rows, capture_gpu_s, generation_gpu_s, prefill_flops
from persona_ray.shards.cut import Load, describe_cut, plan_cut
from persona_ray.shards.size import model_size
from tests.cluster_files.published import PUBLISHED

SIZES = {name: model_size(PUBLISHED[name].config()) for name in ("google/gemma-2-2b-it", "Qwen/Qwen3-8B", "Qwen/Qwen3-32B")}
RATES = st.builds(Rates, flops=st.floats(1e12, 1e15), bytes=st.floats(1e11, 1e13), source=st.just("made up"))
ROWS = st.builds(Rows, number=st.integers(1, 10**6), prompt_tokens=st.floats(1, 500), answer_tokens=st.floats(0, 512))
NAMES = st.sampled_from(sorted(SIZES))


@cache
def replica(name: str, stages: int = 1, *, tensor_parallel: int = 1, captured: tuple[int, ...] | None = None) -> Replica:
    size = SIZES[name]
    load = Load(with_head=True, context=1024, batch_tokens=8192, cache_tokens=8192, drawn_rows=8, tensor_parallel=tensor_parallel)
    cut = describe_cut(size, plan_cut(size, stages, with_head=True, context=1024, tensor_parallel=tensor_parallel), load)
    return Replica(
        size=size,
        cut=cut,
        captured=captured or tuple(range(size.num_layers)),
        dtype_bytes=2,
        unit_rows=64,
        decode_tokens=32_768,
        max_new_tokens=512,
    )


@given(NAMES, ROWS, RATES, st.floats(0, 0.2))
def test_one_stage_captures_as_fast_as_it_computes(name: str, rows: Rows, rates: Rates, padding: float) -> None:
    one = replica(name)
    assert capture_gpu_s(one, rows, rates, padding) == pytest.approx(prefill_flops(one, rows) * (1 + padding) / rates.flops, rel=1e-9)
    whole = replace(rows, prompt_tokens=round(rows.prompt_tokens), answer_tokens=round(rows.answer_tokens))
    counted = rows.number * capture_flops(one.size, [round(whole.tokens)], one.captured)
    assert prefill_flops(one, whole) == pytest.approx(counted)


@given(NAMES, ROWS, RATES, st.integers(1, 6), st.sampled_from([1, 2, 4]))
def test_a_cut_costs_more_by_its_imbalance_and_by_nothing_else(
    name: str, rows: Rows, rates: Rates, stages: int, tensor_parallel: int
) -> None:
    cut, one = replica(name, stages, tensor_parallel=tensor_parallel), replica(name)
    ratio = capture_gpu_s(cut, rows, rates, 0) / capture_gpu_s(one, rows, rates, 0)
    longest = max(stage.end_layer - stage.first_layer for stage in cut.cut.stages)
    assert ratio == pytest.approx(stages * longest / one.size.num_layers, rel=1e-3)  # blocks are alike below the sliding window
    drawn, alone = generation_gpu_s(cut, rows, rates, 0), generation_gpu_s(one, rows, rates, 0)
    assert drawn is not None
    assert alone is not None
    assert drawn >= alone * (1 - 1e-6)


@given(NAMES, ROWS, RATES, st.integers(2, 9))
def test_twice_the_rows_cost_twice_and_faster_gpus_less(name: str, rows: Rows, rates: Rates, times: int) -> None:
    one, more = replica(name, 2), replace(rows, number=times * rows.number)
    faster = replace(rates, flops=times * rates.flops, bytes=times * (rates.bytes or 0))
    for cost in (capture_gpu_s, generation_gpu_s):
        base = cost(one, rows, rates, 0.03)
        assert base is not None
        assert cost(one, more, rates, 0.03) == pytest.approx(times * base)
        assert cost(one, rows, faster, 0.03) == pytest.approx(base / times)


@given(NAMES, ROWS, RATES)
def test_decoding_reads_all_weights_at_every_step(name: str, rows: Rows, rates: Rates) -> None:
    """The same limit that the benchmark holds generation against."""
    one = replica(name)
    assert rates.bytes is not None
    steps = one.max_new_tokens * rows.number / one.unit_rows
    drawn = generation_gpu_s(one, rows, rates, 0)
    assert drawn is not None
    assert drawn >= steps * bandwidth_limit_s(one.cut.stages[0].weight_bytes, 1, rates.bytes) * (1 - 1e-9)


@given(NAMES, ROWS, RATES)
def test_a_cache_without_room_needs_more_batches(name: str, rows: Rows, rates: Rates) -> None:
    roomy = replica(name)
    small = generation_gpu_s(replace(roomy, decode_tokens=2048), rows, rates, 0)
    large = generation_gpu_s(roomy, rows, rates, 0)
    assert small is not None
    assert large is not None
    assert small >= large
    assert generation_gpu_s(roomy, rows, replace(rates, bytes=None), 0) is None


def test_capture_ends_after_the_last_captured_block() -> None:
    rows, rates = Rows(number=10, prompt_tokens=80, answer_tokens=400), Rates(1e14, 1e12, "made up")
    whole, half = replica("Qwen/Qwen3-8B", 2), replica("Qwen/Qwen3-8B", 2, captured=(3, 8))
    assert prefill_flops(half, rows) == pytest.approx(prefill_flops(whole, rows) * 9 / 36)
    assert capture_gpu_s(half, rows, rates, 0) < capture_gpu_s(whole, rows, rates, 0)
