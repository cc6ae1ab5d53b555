"""Rows on a direction: units, places, spreads in one pass, and turns."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_ray.reduce.projection import Direction, Spreads, nth_answers, spread

SEEDS = st.integers(0, 2**32 - 1)


@given(SEEDS, st.floats(0.01, 100))
def test_projections_do_not_depend_on_the_length_of_the_axis_or_the_dims(seed: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    rows_RLD, axis_LD = random.normal(size=(5, 2, 6)), random.normal(size=(2, 6))
    turn_DD = np.linalg.qr(random.normal(size=(6, 6)))[0]
    found = Direction(layers=(3, 7), vector_LD=axis_LD).project(rows_RLD)
    np.testing.assert_allclose(Direction(layers=(3, 7), vector_LD=axis_LD @ turn_DD * scale).project(rows_RLD @ turn_DD), found, atol=1e-10)
    longer = rows_RLD + axis_LD / np.linalg.norm(axis_LD, axis=-1, keepdims=True)
    np.testing.assert_allclose(Direction(layers=(3, 7), vector_LD=axis_LD).project(longer), found + 1, atol=1e-10)


@given(SEEDS)
def test_the_mean_role_is_at_0_and_the_default_at_1(seed: int) -> None:
    random = np.random.default_rng(seed)
    default_LD, mean_role_LD = random.normal(size=(2, 3, 4))
    direction = Direction(layers=(0, 1, 2), vector_LD=default_LD - mean_role_LD, mean_role_LD=mean_role_LD)
    places = direction.places(direction.project(np.stack([mean_role_LD, default_LD, 3 * default_LD - 2 * mean_role_LD])))
    np.testing.assert_allclose(places, [[0] * 3, [1] * 3, [3] * 3], atol=1e-9)
    flat = Direction(layers=(0, 1, 2), vector_LD=np.zeros((3, 4)), mean_role_LD=mean_role_LD)
    np.testing.assert_array_equal(flat.places(flat.project(default_LD[None])), np.zeros((1, 3)))
    assert Direction(layers=(0, 1, 2), vector_LD=default_LD).places(np.zeros((1, 3))) is None


def test_some_layers_in_the_order_asked_for() -> None:
    random = np.random.default_rng(0)
    whole = Direction(layers=(2, 5, 9), vector_LD=random.normal(size=(3, 4)), mean_role_LD=random.normal(size=(3, 4)))
    part = whole.at((9, 2))
    assert part.layers == (9, 2)
    rows_RLD = random.normal(size=(6, 3, 4))
    np.testing.assert_array_equal(part.project(rows_RLD[:, [2, 0]]), whole.project(rows_RLD)[:, [2, 0]])
    places, all_places = part.places(part.project(rows_RLD[:, [2, 0]])), whole.places(whole.project(rows_RLD))
    assert places is not None
    assert all_places is not None
    np.testing.assert_array_equal(places, all_places[:, [2, 0]])
    with pytest.raises(KeyError):
        whole.at((3,))


@given(SEEDS, st.lists(st.integers(0, 30), max_size=4))
def test_spreads_do_not_depend_on_how_rows_come_in(seed: int, cuts: list[int]) -> None:
    random = np.random.default_rng(seed)
    values_RL, archetype_R, answer_R = random.normal(5, 2, size=(30, 2)), random.integers(0, 3, 30), random.integers(1, 4, 30)
    spreads = Spreads()
    for places_R in np.split(random.permutation(30), sorted(cuts)):
        spreads.add(values_RL[places_R], archetype_R[places_R], answer_R[places_R])
    for merged, codes_R in ((spreads.by_archetype(), archetype_R), (spreads.by_answer(), answer_R)):
        assert list(merged) == sorted(set(codes_R.tolist()))
        for code, found in merged.items():
            members = values_RL[codes_R == code]
            assert found.count == len(members)
            np.testing.assert_allclose(found.mean_LD[:, 0], members.mean(axis=0))
            deviation = spread(found)
            if len(members) < 2:
                assert deviation is None
            else:
                assert deviation is not None
                np.testing.assert_allclose(deviation[:, 0], members.std(axis=0, ddof=1))


@given(st.data())
def test_answers_are_counted_within_their_conversation(data: st.DataObject) -> None:
    """Turns of up to five conversations, shuffled; one begins with a system message, so its turns are even."""
    num_answers = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    rows = [
        (conversation % 2, 0, conversation, 0, 2 * answer - 1 + conversation % 2, answer)
        for conversation, number in enumerate(num_answers)
        for answer in range(1, number + 1)
    ]
    shuffled = np.array(data.draw(st.permutations(rows)))
    names = ("archetype", "system_prompt", "question", "sample", "turn")
    found = nth_answers({name: shuffled[:, place] for place, name in enumerate(names)})
    assert found.tolist() == shuffled[:, -1].tolist()


def test_no_rows_have_no_answers() -> None:
    names = ("archetype", "system_prompt", "question", "sample", "turn")
    assert nth_answers({name: np.empty(0, dtype=np.int32) for name in names}).tolist() == []
