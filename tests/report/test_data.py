from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from persona_ray.errors import IntegrityError
from persona_ray.report.data import Ranked, best_place, layer_view, layer_views, missing_names, ranking, role_indices
from persona_ray.spec import Reduced

MakeReduced = Callable[..., Reduced]


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_mean_role_is_the_origin_and_the_default_lies_at_the_axis(make_reduced: MakeReduced, seed: int) -> None:
    reduced = make_reduced(7, 3, 9, spread=1.0, seed=seed)
    roles_ALD = reduced.role_vector_ALD[:-1].astype(np.float64)
    for place, view in enumerate(layer_views(reduced)):
        np.testing.assert_allclose(view.roles_A3.mean(axis=0), 0, atol=1e-5)
        assert view.position_A.mean() == pytest.approx(0, abs=1e-5)
        unit_D = reduced.axis_LD[place] / np.linalg.norm(reduced.axis_LD[place])
        mean_D = roles_ALD[:, place].mean(axis=0)
        projection_A = roles_ALD[:, place] @ unit_D
        np.testing.assert_allclose(view.position_A * view.axis_norm, projection_A - mean_D @ unit_D, atol=1e-4)
        assert (reduced.default_vector_LD[place] - mean_D) @ unit_D == pytest.approx(view.axis_norm, rel=1e-4)
        assert 0 <= view.share_in_plane <= 1 + 1e-6


@given(seed=st.integers(0, 2**32 - 1), flips=hnp.arrays(np.float32, (3, 2), elements=st.sampled_from([-1.0, 1.0])))
@settings(max_examples=30, deadline=None)
def test_pictures_do_not_depend_on_the_arbitrary_signs_of_components(make_reduced: MakeReduced, seed: int, flips: np.ndarray) -> None:
    reduced = make_reduced(7, 3, 9, spread=1.0, seed=seed)
    # The first layer's signs are as they come; all others follow it.
    flips[0] = 1
    components_LKD = reduced.pca_components_LKD.copy()
    components_LKD[:, 1:3] *= flips[:, :, None]
    turned = replace(reduced, pca_components_LKD=components_LKD)
    for expected, found in zip(layer_views(reduced), layer_views(turned), strict=True):
        np.testing.assert_allclose(found.roles_A3, expected.roles_A3, atol=1e-5)
        np.testing.assert_allclose(found.default_3, expected.default_3, atol=1e-5)


def test_map_keeps_distances_where_three_components_hold_everything(make_reduced: MakeReduced) -> None:
    reduced = make_reduced(4)
    view = layer_view(reduced, 0)
    roles_AD = reduced.role_vector_ALD[:-1, 0]
    in_model = np.linalg.norm(roles_AD[0] - roles_AD[3])
    assert np.linalg.norm(view.roles_A3[0] - view.roles_A3[3]) == pytest.approx(in_model, rel=1e-4)


def test_two_roles_make_a_map_too(make_reduced: MakeReduced) -> None:
    view = layer_view(make_reduced(2), 0)
    assert view.roles_A3.shape == (2, 3)
    np.testing.assert_allclose(view.roles_A3[:, 2], 0, atol=1e-5)


def test_ranking_puts_the_most_assistant_like_first(make_reduced: MakeReduced) -> None:
    reduced = make_reduced(num_roles=12)
    ranked = ranking(reduced, layer_view(reduced, 3))
    assert ranked[0] == Ranked("default", 1.0, 32, is_default=True)
    assert ranked[1].name == "role_11"
    assert ranked[-1].name == "role_0"
    assert [line.position for line in ranked] == sorted((line.position for line in ranked), reverse=True)
    assert ranked[-1].num_rows == 20


def test_archetypes_with_too_few_rows_are_named_and_not_drawn(make_reduced: MakeReduced) -> None:
    reduced = make_reduced(num_roles=5)
    roles_ALD = reduced.role_vector_ALD.copy()
    roles_ALD[2] = np.nan
    reduced = replace(reduced, role_vector_ALD=roles_ALD)
    assert role_indices(reduced).tolist() == [0, 1, 3, 4]
    assert missing_names(reduced) == ("role_2",)
    assert "role_2" not in {line.name for line in ranking(reduced, layer_view(reduced, 0))}


def test_best_layer_is_a_decoder_block_and_not_a_place(make_reduced: MakeReduced) -> None:
    reduced = replace(make_reduced(best_layer=8), layers=(0, 4, 8, 12))
    assert best_place(reduced) == 2
    assert layer_view(reduced, 2).layer == 8


def test_unknown_best_layer_is_an_error_in_words(make_reduced: MakeReduced) -> None:
    with pytest.raises(IntegrityError, match=r"best_layer is 99, expected one of \[0, 1, 2, 3\]"):
        best_place(make_reduced(best_layer=99))


def test_no_role_vector_at_all_is_an_error_in_words(make_reduced: MakeReduced) -> None:
    reduced = make_reduced()
    with pytest.raises(IntegrityError, match=r"lower reduce\.min_count"):
        role_indices(replace(reduced, role_vector_ALD=np.full_like(reduced.role_vector_ALD, np.nan)))


def test_layer_without_an_axis_has_everyone_at_zero(make_reduced: MakeReduced) -> None:
    reduced = make_reduced()
    axis_LD = reduced.axis_LD.copy()
    axis_LD[1] = 0
    view = layer_view(replace(reduced, axis_LD=axis_LD), 1)
    assert not view.position_A.any()
    assert view.share_in_plane == 0
