"""The draw, against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_ray.shards.sampling import draw, likeliest, uniform_stream
from persona_ray.spec import Sampling

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0]])


def frequencies(sampling: Sampling, num_draws: int = 4000) -> np.ndarray:
    uniform = torch.from_numpy(uniform_stream(0, "frequencies", num_draws))
    tokens = draw(LOGITS.expand(num_draws, -1), uniform, sampling).numpy()
    return np.bincount(tokens, minlength=LOGITS.shape[1]) / num_draws


def test_frequencies_follow_the_softmax() -> None:
    expected = torch.softmax(LOGITS[0] / 0.7, -1).numpy()
    np.testing.assert_allclose(frequencies(Sampling(max_new_tokens=1, temperature=0.7)), expected, atol=0.03)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    probability = torch.softmax(LOGITS[0], -1).numpy()
    found = frequencies(Sampling(max_new_tokens=1, temperature=1.0, top_p=float(probability[:2].sum()) - 1e-6))
    np.testing.assert_allclose(found[:2], probability[:2] / probability[:2].sum(), atol=0.03)
    assert not found[2:].any()


def test_top_k_keeps_k() -> None:
    assert np.flatnonzero(frequencies(Sampling(max_new_tokens=1, temperature=5.0, top_k=3))).tolist() == [0, 1, 2]


@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=12),
    uniform=st.floats(0, 1, exclude_max=True),
    top_p=st.floats(0.01, 1),
    temperature=st.floats(0.05, 3),
)
@settings(max_examples=200, deadline=None)
def test_a_draw_is_always_among_the_kept_tokens(logits: list[float], uniform: float, top_p: float, temperature: float) -> None:
    logits_V = torch.tensor([logits])
    token = int(draw(logits_V, torch.tensor([uniform]), Sampling(max_new_tokens=1, temperature=temperature, top_p=top_p)))
    probability = torch.softmax(logits_V.double() / temperature, -1)[0]
    likelier = float(probability[probability > probability[token]].sum())
    assert likelier < top_p + 1e-9


@given(seed=st.integers(0, 10_000), top_p=st.floats(0.05, 1), scale=st.floats(0, 6), rounded=st.booleans())
@settings(max_examples=100)
def test_looking_at_candidates_first_draws_what_sorting_everything_draws(seed: int, top_p: float, scale: float, rounded: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_BV = scale * torch.randn(3, 500, generator=generator)
    if rounded:  # many ties
        logits_BV = logits_BV.round()
    probability_BV = torch.softmax(logits_BV.double(), -1)
    sorted_BV, token_BV = torch.sort(probability_BV, dim=-1, descending=True, stable=True)
    in_nucleus_BV = sorted_BV.cumsum(-1) - sorted_BV < top_p
    found_BN, found_token_BN = likeliest(probability_BV, top_p)
    for row, (size, probability_N, token_N) in enumerate(zip(in_nucleus_BV.sum(-1).tolist(), found_BN, found_token_BN, strict=True)):
        assert torch.equal(probability_N[:size], sorted_BV[row, :size])
        assert torch.equal(token_N[:size], token_BV[row, :size])


def test_temperature_zero_is_greedy() -> None:
    assert int(draw(LOGITS, torch.tensor([0.99]), Sampling(max_new_tokens=1, temperature=0))) == 0


def test_streams_are_prefixes_of_themselves_and_differ_from_each_other() -> None:
    long = uniform_stream(7, "pirate/0/3/0/2", 50)
    assert np.array_equal(uniform_stream(7, "pirate/0/3/0/2", 20), long[:20])
    assert not np.array_equal(uniform_stream(8, "pirate/0/3/0/2", 20), long[:20])
    assert not np.array_equal(uniform_stream(7, "pirate/0/3/0/1", 20), long[:20])
    assert ((long >= 0) & (long < 1)).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_streams_do_not_change_between_versions(seed: int) -> None:
    """A resumed run must draw what the first one would have drawn."""
    expected = {0: STREAM_0, 1: STREAM_1}[seed]
    np.testing.assert_array_equal(uniform_stream(seed, "angel/0/0/0/1", 3), expected)


STREAM_0 = [0.6636303777015734, 0.11715206304257564, 0.5393052147168277]
STREAM_1 = [0.8810819073144364, 0.4300377175139217, 0.653190813215549]
