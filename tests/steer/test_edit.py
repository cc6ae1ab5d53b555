from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persona_ray.errors import InputError
from persona_ray.steer.edit import AddVector, along, random_like

WIDTH = 8
AXIS_D = np.random.default_rng(0).standard_normal(WIDTH).astype(np.float32)
HIDDEN_BTD = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0))

strengths = st.floats(-4, 4, width=32)


def test_strength_zero_changes_nothing() -> None:
    assert torch.equal(along(AXIS_D, 1, 0.0)(HIDDEN_BTD), HIDDEN_BTD)
    assert torch.equal(random_like(AXIS_D, 1, 0.0, seed=1)(HIDDEN_BTD), HIDDEN_BTD)


@given(strengths, strengths)
def test_strengths_add_up(first: float, second: float) -> None:
    one_after_the_other = along(AXIS_D, 1, second)(along(AXIS_D, 1, first)(HIDDEN_BTD))
    torch.testing.assert_close(one_after_the_other, along(AXIS_D, 1, first + second)(HIDDEN_BTD), atol=1e-5, rtol=1e-5)


@given(strengths)
def test_the_opposite_strength_undoes(strength: float) -> None:
    torch.testing.assert_close(along(AXIS_D, 1, -strength)(along(AXIS_D, 1, strength)(HIDDEN_BTD)), HIDDEN_BTD, atol=1e-5, rtol=1e-5)


def test_every_token_position_moves_by_the_vector() -> None:
    moved = along(AXIS_D, 1, 2.0)(HIDDEN_BTD) - HIDDEN_BTD
    torch.testing.assert_close(moved, torch.tensor(2 * AXIS_D).expand(2, 3, WIDTH), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_shape_stay_and_the_input_is_untouched(dtype: torch.dtype) -> None:
    hidden_BTD = HIDDEN_BTD.to(dtype)
    before = hidden_BTD.clone()
    edited_BTD = along(AXIS_D, 1, 1.0)(hidden_BTD)
    assert edited_BTD.dtype == dtype
    assert edited_BTD.shape == hidden_BTD.shape
    assert torch.equal(hidden_BTD, before)


@given(seed=st.integers(0, 1000), strength=strengths)
def test_a_random_direction_has_the_axis_norm_and_follows_its_seed(seed: int, strength: float) -> None:
    edit = random_like(AXIS_D, 2, strength, seed)
    assert np.linalg.norm(edit.vector_D) == pytest.approx(abs(strength) * np.linalg.norm(AXIS_D), rel=1e-5)
    np.testing.assert_array_equal(edit.vector_D, random_like(AXIS_D, 2, strength, seed).vector_D)
    if strength:
        assert (edit.vector_D != random_like(AXIS_D, 2, strength, seed + 1).vector_D).any()


def test_opposite_random_strengths_are_opposite() -> None:
    np.testing.assert_array_equal(random_like(AXIS_D, 2, 1.5, 3).vector_D, -random_like(AXIS_D, 2, -1.5, 3).vector_D)


def test_read_only_vectors_and_pickles_work() -> None:
    vector_D = AXIS_D.copy()
    vector_D.flags.writeable = False
    edit = pickle.loads(pickle.dumps(AddVector(3, vector_D)))
    assert edit.layer == 3
    assert torch.equal(edit(HIDDEN_BTD), AddVector(3, AXIS_D)(HIDDEN_BTD))


@pytest.mark.parametrize(
    "vector", [np.zeros((1, WIDTH), np.float32), np.full(WIDTH, np.nan, np.float32), np.full(WIDTH, np.inf, np.float32)]
)
def test_a_vector_that_is_none_is_refused(vector: np.ndarray) -> None:
    with pytest.raises(InputError, match="steering vector"):
        AddVector(0, vector)


@pytest.mark.parametrize("width", [1, WIDTH - 1])
def test_another_width_is_refused_and_never_broadcast(width: int) -> None:
    with pytest.raises(InputError, match=f"{width} dims, the model's residual stream {WIDTH}"):
        AddVector(0, np.ones(width, np.float32))(HIDDEN_BTD)
