"""The steps that a GPU takes over, here by torch on the CPU: the same as numpy's. Nothing here has seen a GPU."""

from __future__ import annotations

import numpy as np
import pytest

from persona_ray.reduce import gpu
from persona_ray.reduce.incremental import leading
from persona_ray.reduce.scatter import Scatter


@pytest.mark.parametrize("shape", [(2, 5, 9), (2, 9, 5), (1, 4, 4)])
def test_leading_directions_are_those_of_numpy_up_to_sign(shape: tuple[int, int, int]) -> None:
    factor_LMD = np.random.default_rng(0).standard_normal(shape)
    found_LKD = gpu.leading(factor_LMD, 3, device="cpu")
    for found_KD, factor_MD in zip(found_LKD, factor_LMD, strict=True):
        expected_KD = leading(factor_MD, 3)
        signs_K1 = np.sign((found_KD * expected_KD).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(signs_K1 * found_KD, expected_KD, atol=1e-10)


def test_the_scatter_is_that_of_numpy() -> None:
    rows_RLD = np.random.default_rng(1).standard_normal((7, 2, 4)).astype(np.float32)
    expected = Scatter.of(rows_RLD, 3)
    centred_LRD = np.swapaxes(rows_RLD, 0, 1).astype(np.float64) - expected.mean_LD[:, None]
    np.testing.assert_allclose(gpu.scatter(centred_LRD, device="cpu"), expected.scatter_LDD, rtol=1e-12)


def test_a_gpu_that_can_be_seen_is_not_a_gpu_that_was_given(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As on a node where a scheduler has set it for everybody: reducing stays off it, and a task that has one says if it is not there."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(gpu, "_is_found", lambda: True)
    assert not gpu.is_given()
    with gpu.given():
        assert gpu.is_given()
    assert not gpu.is_given()
    monkeypatch.setattr(gpu, "_is_found", lambda: False)
    with gpu.given():
        assert not gpu.is_given()
    assert "torch finds none" in caplog.text
