"""Error bars: one pass in any order gives the numbers of the plain definition, and what they promise comes true on simulated sets."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_ray.errors import InputError
from persona_ray.reduce.axis import assistant_axis, projections
from persona_ray.reduce.merging import merge_all
from persona_ray.reduce.replicates import ReplicateAxes, ReplicatePositions
from persona_ray.reduce.uncertainty import axis_certainty, certainty_of, position_intervals
from persona_ray.reduce.weightings import CountedRows, Weightings, poisson_weights
from persona_ray.spec import ScoredRows

NUM_ROLES, NUM_QUESTIONS, SAMPLES, WIDTH = 5, 7, 2, 6


def grid(num_roles: int, num_questions: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Archetype 0 is the default Assistant; work order: question by question, archetype by archetype."""
    question_N, archetype_N, _ = (index.ravel() for index in np.indices((num_questions, num_roles + 1, samples)))
    return archetype_N.astype(np.int64), question_N.astype(np.int64)


def scored(rollout_N: np.ndarray, archetype_N: np.ndarray, values_ND: np.ndarray) -> ScoredRows:
    no_score_N = np.full(len(rollout_N), -1, np.int8)
    return ScoredRows(rollout_N, archetype_N.astype(np.int32), no_score_N, values_ND[:, None].astype(np.float32))


def weightings_of(archetype_N: np.ndarray, question_N: np.ndarray, counts_N: np.ndarray, replicates: int, seed: int) -> Weightings:
    groups = {code: code for code in range(archetype_N.max() + 1)}
    rows = CountedRows.of(np.arange(len(archetype_N)), archetype_N, question_N, counts_N, groups)
    return Weightings.of(rows, replicates, seed)


@given(seed=st.integers(0, 10**6), num_pieces=st.integers(1, 6))
def test_one_pass_in_pieces_equals_the_definition(seed: int, num_pieces: int) -> None:
    generator = np.random.default_rng(seed)
    archetype_N, question_N = grid(NUM_ROLES, NUM_QUESTIONS, SAMPLES)
    values_ND = generator.standard_normal((len(archetype_N), WIDTH)) + archetype_N[:, None]
    counts_N = (generator.random(len(archetype_N)) < 0.8) | (archetype_N == 0)
    weightings = weightings_of(archetype_N, question_N, counts_N, replicates=8, seed=seed)
    pieces = np.array_split(generator.permutation(len(archetype_N)), num_pieces)
    parts = [scored(np.sort(piece), archetype_N[np.sort(piece)], values_ND[np.sort(piece)]) for piece in pieces]
    axes = merge_all(map(partial(ReplicateAxes.of, weightings=weightings), parts))
    positions = merge_all(map(partial(ReplicatePositions.of, weightings=weightings, unit_CLD=axes.unit_CLD), parts))

    values_ND = values_ND.astype(np.float32).astype(np.float64)
    weight_NC = np.zeros((len(archetype_N), weightings.num_weightings))
    weight_NC[counts_N] = weightings.weights(np.arange(int(counts_N.sum())))
    for column in np.flatnonzero(weightings.is_usable_C):
        present = [code for code in range(NUM_ROLES + 1) if weight_NC[archetype_N == code, column].sum() > 0]
        means_AD = np.stack(
            [np.average(values_ND[archetype_N == code], axis=0, weights=weight_NC[archetype_N == code, column]) for code in present]
        )
        axis_D = assistant_axis(means_AD[0], means_AD[1:])
        np.testing.assert_allclose(axes.axis_CLD[column, 0], axis_D, atol=1e-12)
        expected_A = projections(means_AD[:, None], axis_D[None])[:, 0]
        np.testing.assert_allclose(positions.position_GCL[present, column, 0], expected_A, atol=1e-12)


def test_a_weighting_is_what_its_name_says() -> None:
    archetype_N, question_N = grid(NUM_ROLES, NUM_QUESTIONS, SAMPLES)
    everything_N = np.ones(len(archetype_N), dtype=bool)
    weightings = weightings_of(archetype_N, question_N, everything_N, replicates=50, seed=3)
    weight_NC = weightings.weights(np.arange(len(archetype_N)))
    assert (weight_NC[:, 0] == 1).all()
    assert (weight_NC[:, weightings.halves].sum(axis=1) == 1).all()
    assert weightings.beginnings == (1, 2, 5, 10)
    for number, column in zip(weightings.beginnings, weight_NC[:, weightings.beginning_columns].T, strict=True):
        assert np.bincount(archetype_N, column).tolist() == [number] * (NUM_ROLES + 1)
        assert column.cumsum().max() == column[: number * (NUM_ROLES + 1) + SAMPLES * NUM_ROLES].sum(), "the first rows in work order"
    for question in range(NUM_QUESTIONS):
        replicates_MB = weight_NC[question_N == question][:, weightings.replicates]
        assert (replicates_MB == replicates_MB[0]).all(), "a question is drawn as a whole"
    other = poisson_weights(np.array([4, 5]), 50, 3)
    np.testing.assert_array_equal(other[0], poisson_weights(np.array([4]), 50, 3)[0])


def test_one_question_says_nothing() -> None:
    archetype_N, question_N = grid(2, 1, 5)
    with pytest.raises(InputError, match="two questions"):
        weightings_of(archetype_N, question_N, np.ones(len(archetype_N), dtype=bool), 10, 0)


def test_roles_are_named_and_their_intervals_hold_their_positions() -> None:
    archetype_N, question_N = grid(2, 6, 30)
    generator = np.random.default_rng(0)
    values_ND = generator.standard_normal((len(archetype_N), 4)) * 0.05 + np.eye(4)[archetype_N]
    weightings = weightings_of(archetype_N, question_N, np.ones(len(archetype_N), dtype=bool), replicates=100, seed=1)
    rows = scored(np.arange(len(archetype_N)), archetype_N, values_ND)
    axes = ReplicateAxes.of(rows, weightings)
    positions = ReplicatePositions.of(rows, weightings, axes.unit_CLD)
    found = certainty_of(axes, positions, weightings, layer=7, names=["default", "bard", "sage"], confidence=0.9)
    assert (found.layer, found.num_questions, found.num_replicates) == (7, 6, 100)
    assert list(found.roles) == ["bard", "sage"]
    for one in (found.default, *found.roles.values()):
        assert one.low < one.position < one.high
    assert {(one.rank_low, one.rank_high) for one in found.roles.values()} <= {(1, 1), (1, 2), (2, 2)}
    assert found.default.rank_low is None
    assert 0 < found.cone_degrees < 10
    assert found.split_half_cosine > 0.99
    assert found.rows_needed in found.rows_per_archetype
    assert found.rows_needed <= 50


def test_intervals_and_cone_keep_their_promise() -> None:
    """1,000 simulated sets: rows = archetype + what the question does to everybody + what it does to this archetype + noise."""
    num_sets, num_roles, num_questions, samples, width = 1000, 6, 30, 2, 12
    archetype_N, question_N = grid(num_roles, num_questions, samples)
    everything_N = np.ones(len(archetype_N), dtype=bool)
    rollout_N = np.arange(len(archetype_N))
    generator = np.random.default_rng(7)
    weightings = weightings_of(archetype_N, question_N, everything_N, replicates=200, seed=0)
    hits, cones, wide = 0, 0, []
    for _ in range(num_sets):
        truth_AD = generator.standard_normal((num_roles + 1, width)) + 5.0  # all of them far from the origin, as real ones are
        values_ND = (
            truth_AD[archetype_N]
            + 0.5 * generator.standard_normal((num_questions, width))[question_N]
            + 0.7 * generator.standard_normal((num_questions, num_roles + 1, width))[question_N, archetype_N]
            + 0.7 * generator.standard_normal((len(archetype_N), width))
        )
        kept_N = (generator.random(len(archetype_N)) < 0.8) | (archetype_N == 0)
        weightings = weightings_of(archetype_N, question_N, kept_N, replicates=200, seed=0)
        rows = scored(rollout_N, archetype_N, values_ND)
        axes = ReplicateAxes.of(rows, weightings)
        intervals = position_intervals(ReplicatePositions.of(rows, weightings, axes.unit_CLD), weightings, 0.9)
        axis_D = assistant_axis(truth_AD[0], truth_AD[1:])
        true_A = projections(truth_AD[:, None], axis_D[None])[:, 0]
        hits += int(((intervals.low_GL[:, 0] <= true_A) & (true_A <= intervals.high_GL[:, 0])).sum())
        cosine = axes.unit_CLD[0, 0] @ axis_D / np.linalg.norm(axis_D)
        cone = axis_certainty(axes, weightings, 0.9).cone_degrees_L[0]
        cones += int(np.degrees(np.arccos(cosine)) <= cone)
        wide.append(cone)
    assert 0.85 <= hits / (num_sets * (num_roles + 1)) <= 0.95
    assert cones / num_sets >= 0.85
    assert 0 < np.median(wide) < 45, "a cone that holds everything says nothing"
    print(f"\ncoverage: {hits / (num_sets * (num_roles + 1)):.3f} of positions, {cones / num_sets:.3f} of axes")


def test_a_half_without_an_axis_is_not_compared_and_too_few_replicates_tell_nothing() -> None:
    archetype_N, question_N = grid(3, 2, 4)
    counts_N = ~((archetype_N == 0) & (question_N == 1))  # the default Assistant has answered one question only
    values_ND = np.random.default_rng(0).standard_normal((len(archetype_N), WIDTH)) + archetype_N[:, None]
    whole = scored(np.arange(len(archetype_N)), archetype_N, values_ND)
    for replicates, is_told in ((200, True), (9, False)):
        weightings = weightings_of(archetype_N, question_N, counts_N, replicates=replicates, seed=1)
        axes = ReplicateAxes.of(whole, weightings)
        positions = ReplicatePositions.of(whole, weightings, axes.unit_CLD)
        told = certainty_of(axes, positions, weightings, layer=0, names=["d", "a", "b", "c"], confidence=0.9)
        assert (told is not None) == is_told
        assert told is None or told.split_half_cosine is None
