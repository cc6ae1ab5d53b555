from __future__ import annotations

import numpy as np

from persona_ray.bench_store.work import like_a_residual_stream


def test_made_up_activations_have_massive_dims_and_a_common_mean() -> None:
    values_RLD = like_a_residual_stream(np.random.default_rng(0), 64, 3, 512)
    assert values_RLD.shape == (64, 3, 512)
    assert values_RLD.dtype == np.float32
    largest_D = np.sort(np.abs(values_RLD[:, -1]).mean(axis=0))
    assert largest_D[-1] > 20 * np.median(largest_D)
    centred_RD = values_RLD[:, -1] - values_RLD[:, -1].mean(axis=0)
    assert np.linalg.norm(centred_RD) < np.linalg.norm(values_RLD[:, -1])
