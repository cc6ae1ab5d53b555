"""The stopping rule: its estimate comes true on simulated rows, whatever pieces they come in, and the full plan keeps its verdict."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_ray.reduce.axis import assistant_axis
from persona_ray.reduce.convergence import MIN_BATCHES, NUM_BATCHES, BatchMeans, Look, StopRule


def rows_of(
    generator: np.random.Generator, num_groups: int, number: int, width: int, noise: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Work order: one row of every group, and again. True means are the same for one seed."""
    means_GD = np.random.default_rng(1).standard_normal((num_groups, width))
    ordinal_N, group_N = (index.ravel() for index in np.indices((number, num_groups)))
    values_ND = means_GD[group_N] + noise * generator.standard_normal((len(group_N), width))
    return group_N, ordinal_N, values_ND[:, None].astype(np.float32)


@given(number=st.integers(MIN_BATCHES, 70), num_pieces=st.integers(1, 9), seed=st.integers(0, 1000), kept=st.floats(0.5, 1.0))
def test_any_pieces_in_order_give_the_plain_axis_and_the_plain_variance(number: int, num_pieces: int, seed: int, kept: float) -> None:
    generator = np.random.default_rng(seed)
    group_N, ordinal_N, values_NLD = rows_of(generator, 4, number, 5, 1.0)
    is_kept_N = (generator.random(len(group_N)) < kept) | (group_N == 0)
    group_N, ordinal_N, values_NLD = group_N[is_kept_N], ordinal_N[is_kept_N], values_NLD[is_kept_N]
    batches = BatchMeans(4, (1, 5))
    for piece in np.array_split(np.arange(len(group_N)), num_pieces):
        batches.add(group_N[piece], ordinal_N[piece], values_NLD[piece])
    look = batches.look(min_count=1)
    counts_G = np.bincount(group_N, minlength=4)
    if (counts_G[1:] > 0).sum() < 2:
        assert look is None
        return
    assert look is not None
    means = {group: values_NLD[group_N == group, 0].astype(float).mean(axis=0) for group in range(4) if counts_G[group]}
    np.testing.assert_allclose(look.axis_LD[0], assistant_axis(means[0], np.stack([means[g] for g in sorted(means) if g])), atol=1e-10)
    width = batches.width
    assert (number - 1) // width < NUM_BATCHES
    weight = {group: (1.0 if group == 0 else -1.0 / (len(means) - 1)) / counts_G[group] for group in means}
    parts = np.zeros((NUM_BATCHES, 5))
    for group, ordinal, value_LD in zip(group_N, ordinal_N, values_NLD, strict=True):
        parts[ordinal // width] += weight[group] * (value_LD[0] - means[group])
    num_used = (number - 1) // width + 1
    assert look.variance_L[0] == pytest.approx(num_used / (num_used - 1) * (parts**2).sum(), rel=1e-8)


def test_the_expected_cosine_is_the_one_that_comes_true() -> None:
    """Over 200 simulated runs, against the axis of the true means."""
    num_groups, number, width, noise = 6, 40, 64, 3.0
    means_GD = np.random.default_rng(1).standard_normal((num_groups, width))
    truth_D = assistant_axis(means_GD[0], means_GD[1:])
    expected, real = [], []
    for seed in range(200):
        batches = BatchMeans(num_groups, (1, width))
        batches.add(*rows_of(np.random.default_rng([5, seed]), num_groups, number, width, noise))
        look = batches.look(min_count=1)
        assert look is not None
        expected.append(look.cosine_L[0])
        real.append(float(look.cosine_with(Look(truth_D[None], np.zeros(1)))[0]))
    assert np.mean(expected) == pytest.approx(np.mean(real), abs=0.005)
    assert np.mean(real) < 0.99, "there is something to estimate"


def test_the_rule_stops_early_and_the_full_plan_agrees() -> None:
    num_groups, number, width, noise = 12, 300, 96, 0.3
    group_N, ordinal_N, values_NLD = rows_of(np.random.default_rng(0), num_groups, number, width, noise)
    rule, batches = StopRule(cosine=0.999, patience=3, min_per_archetype=10), BatchMeans(num_groups, (1, width))
    stopped_at = None
    for wave in range(number):
        rows = slice(wave * num_groups, (wave + 1) * num_groups)
        batches.add(group_N[rows], ordinal_N[rows], values_NLD[rows])
        if stopped_at is None and rule.is_due(wave + 1) and rule.take(batches.look(min_count=10), wave + 1):
            stopped_at, early = wave + 1, batches.look(min_count=10)
    full = batches.look(min_count=10)
    assert stopped_at is not None
    assert early is not None
    assert full is not None
    assert 10 <= stopped_at < number / 2
    assert early.cosine_with(full)[0] >= 0.998


def test_a_look_that_fails_starts_the_patience_again_and_looks_are_spaced() -> None:
    still, moved = (Look(np.array([[1.0, side]]), np.zeros(1)) for side in (0.0, 0.2))
    rule = StopRule(cosine=0.999, patience=2, min_per_archetype=5)
    assert not rule.is_due(4)
    assert rule.is_due(5)
    assert [rule.take(look, 10 + n) for n, look in enumerate([still, still, moved, moved, moved])] == [False, False, False, False, True]
    assert not rule.is_due(15)
    assert rule.is_due(16)
    assert not rule.take(None, 20)
    assert rule.num_held == 0


def test_noise_alone_never_holds_still() -> None:
    group_N, ordinal_N, values_NLD = rows_of(np.random.default_rng(0), 5, 40, 32, 50.0)
    batches = BatchMeans(5, (1, 32))
    batches.add(group_N, ordinal_N, values_NLD)
    look = batches.look(min_count=1)
    assert look is not None
    assert look.cosine_L[0] < 0.9


def test_too_little_to_look_at() -> None:
    batches = BatchMeans(3, (1, 2))
    assert batches.look(1) is None
    ones = np.ones((1, 1, 2), np.float32)
    for ordinal in range(MIN_BATCHES):
        assert batches.look(1) is None
        for group in range(3):
            batches.add(np.array([group]), np.array([ordinal]), ones * group)
    assert batches.look(1) is not None
    assert batches.look(MIN_BATCHES + 1) is None
