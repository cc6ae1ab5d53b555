from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any, Literal

import ml_dtypes
import numpy as np
import pytest

from persona_ray.config import ReduceConfig
from persona_ray.errors import NothingUsableError
from persona_ray.reduce.moments import GroupMoments, Moments
from persona_ray.reduce.persona_space import Block, RowComponents, persona_space
from persona_ray.spec import Reduced, ScoredRows

ARCHETYPES = ("accountant", "helper", "ghost", "witch", "rare")
POSITION = {"accountant": 2.0, "helper": 4.0, "ghost": -3.0, "witch": -2.0, "rare": 9.0}
LAYERS = (0, 4, 8)
WIDTH = 12


def planted_moments(rows_each: int = 40, without: tuple[str, ...] = ()) -> tuple[Moments, np.ndarray]:
    """Rows around POSITION x a planted direction; the middle layer has the least noise. `rare` has two rows only."""
    generator = np.random.default_rng(7)
    direction_D = generator.standard_normal(WIDTH)
    direction_D /= np.linalg.norm(direction_D)
    noise_L = np.array([2.0, 0.2, 1.0])
    archetype_R = np.array(
        [code for code, name in enumerate(ARCHETYPES) if name not in without for _ in range(2 if name == "rare" else rows_each)]
    )
    position_R = np.array([POSITION[ARCHETYPES[code]] for code in archetype_R])
    noise_RLD = generator.standard_normal((len(archetype_R), len(LAYERS), WIDTH)) * noise_L[:, None]
    activations_RLD = (50 + position_R[:, None, None] * direction_D + noise_RLD).astype(np.float32)
    score_R = np.where(np.arange(len(archetype_R)) % 4 == 0, 1, 3).astype(np.int8)
    # What fails the filter stands elsewhere, so that a filter which does nothing is seen.
    activations_RLD[(score_R == 1) & (archetype_R != 1)] += 5
    return Moments.of(ScoredRows(np.arange(len(archetype_R)), archetype_R.astype(np.int32), score_R, activations_RLD)), direction_D


def space_of(moments: Moments, layers: tuple[int, ...] = LAYERS, pca: RowComponents | None = None, **changes: Any) -> Reduced:
    settings: dict[str, Any] = {
        "archetypes": ARCHETYPES,
        "default_archetypes": ("helper",),
        "config": ReduceConfig(min_count=10),
        "judge_name": "lexicon-abc",
        "ledger_digest": "d1",
    }
    return persona_space([Block(layers, moments, pca)], **(settings | changes))


def test_the_planted_axis_is_recovered() -> None:
    moments, direction_D = planted_moments()
    space = space_of(moments)
    axis_D = space.axis_LD[1]
    assert axis_D @ direction_D / np.linalg.norm(axis_D) > 0.99
    assert space.attributes["best_layer"] == 4
    assert "layer 4" in space.attributes["best_layer_reason"]
    assert space.cos_pc1_axis_L[1] > 0.99
    order = sorted(space.attributes["projections"], key=lambda name: space.attributes["projections"][name][1])
    assert order == ["ghost", "witch", "accountant", "helper"]


def test_shapes_dtypes_and_missing_role_vectors() -> None:
    space = space_of(planted_moments()[0])
    assert space.role_vector_ALD.shape == (5, 3, WIDTH)
    assert np.isnan(space.role_vector_ALD).all(axis=(1, 2)).tolist() == [False, True, False, False, True]
    assert space.role_count_A.tolist() == [30, 40, 30, 30, 1]
    assert space.pca_components_LKD.shape == (3, 2, WIDTH)
    for name in ("role_vector_ALD", "default_vector_LD", "axis_LD", "pca_components_LKD", "pca_explained_variance_LK", "cos_pc1_axis_L"):
        assert getattr(space, name).dtype == np.float32
    kept_ALD = space.role_vector_ALD[[0, 2, 3]].astype(np.float64)
    np.testing.assert_allclose(space.axis_LD, space.default_vector_LD - kept_ALD.mean(axis=0), atol=1e-4)


def test_attributes_are_plain_json_and_say_how_it_was_made() -> None:
    space = space_of(planted_moments()[0])
    attributes = json.loads(json.dumps(space.attributes, allow_nan=False))
    assert attributes["judge"] == "lexicon-abc"
    assert (attributes["min_score"], attributes["min_count"]) == (3, 10)
    assert len(attributes["separation"]) == len(attributes["axis_norm"]) == len(LAYERS)
    assert attributes["default_archetypes"] == ["helper"]
    np.testing.assert_allclose(attributes["axis_norm"], np.linalg.norm(space.axis_LD, axis=1), rtol=1e-5)


def test_the_unit_axis_is_the_axis_without_its_length() -> None:
    space = space_of(planted_moments()[0])
    nowhere_D = np.zeros(WIDTH, dtype=np.float32)
    unit_LD = replace(space, axis_LD=np.stack([*space.axis_LD[:2], nowhere_D])).unit_axis_LD
    assert unit_LD.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(unit_LD, axis=1), [1, 1, 0], atol=1e-6)
    np.testing.assert_allclose(unit_LD[:2] * np.array(space.attributes["axis_norm"])[:2, None], space.axis_LD[:2], rtol=1e-5, atol=1e-6)


def test_without_a_judge_every_row_counts_and_the_result_says_so() -> None:
    space = space_of(planted_moments()[0], judge_name=None)
    assert space.role_count_A.tolist() == [40, 40, 40, 40, 2]
    assert space.attributes["min_score"] is None
    assert "every row counts" in space.attributes["filter"]


@pytest.mark.parametrize(
    "change", [{"ledger_digest": "d2"}, {"judge_name": "scores-1"}, {"judge_name": None}, {"config": ReduceConfig(min_count=11)}]
)
def test_other_data_scores_or_settings_have_another_name(change: dict[str, Any]) -> None:
    moments, _ = planted_moments()
    assert space_of(moments, **change).name != space_of(moments).name == space_of(moments).name


def test_no_default_rows_is_an_error_in_words() -> None:
    with pytest.raises(NothingUsableError, match=r"default Assistant \(helper\)"):
        space_of(planted_moments(without=("helper",))[0])


def test_too_few_role_vectors_is_an_error_with_a_way_out() -> None:
    with pytest.raises(
        NothingUsableError,
        match=r"0 of 4 archetypes .*min_count = 31 rows of score >= 3, and the best archetype has 30 \(left out: 31 of score 1\)\. .*lower",
    ):
        space_of(planted_moments()[0], config=ReduceConfig(min_count=31))


def test_two_role_vectors_suffice() -> None:
    space = space_of(planted_moments(without=("ghost", "rare"))[0])
    assert space.pca_explained_variance_ratio_LK.shape == (3, 1)
    np.testing.assert_allclose(space.pca_explained_variance_ratio_LK, 1.0)


def test_one_row_each_still_gives_an_axis() -> None:
    rows = ScoredRows(np.arange(3), np.arange(3, dtype=np.int32), np.full(3, -1, np.int8), np.eye(3, dtype=np.float32)[:, None, :])
    space = space_of(Moments.of(rows), (0,), judge_name=None, config=ReduceConfig(min_count=1))
    assert space.attributes["separation"] == [None]
    assert "cannot be compared" in space.attributes["best_layer_reason"]


def test_layers_in_blocks_give_the_same_bits_as_all_at_once() -> None:
    moments, _ = planted_moments()
    whole = space_of(moments)
    blocks = [Block((0,), only_layers(moments, slice(0, 1))), Block((4, 8), only_layers(moments, slice(1, 3)))]
    joined = persona_space(
        iter(blocks),
        archetypes=ARCHETYPES,
        default_archetypes=("helper",),
        config=ReduceConfig(),
        judge_name="lexicon-abc",
        ledger_digest="d1",
    )
    assert (joined.name, joined.layers, joined.attributes) == (whole.name, whole.layers, whole.attributes)
    for field in fields(Reduced):
        if isinstance(getattr(whole, field.name), np.ndarray):
            np.testing.assert_array_equal(getattr(joined, field.name), getattr(whole, field.name))


def only_layers(moments: Moments, layers: slice) -> Moments:
    return Moments(
        {group: GroupMoments(found.count, found.mean_LD[layers], found.m2_LD[layers]) for group, found in moments.groups.items()}
    )


def with_somewhat() -> Moments:
    """`planted_moments`, and 20 rows of score 2 for two archetypes, far off."""
    generator = np.random.default_rng(3)
    archetype_R = np.repeat([0, 2, 3], [20, 20, 4]).astype(np.int32)
    rows_RLD = (90 + generator.standard_normal((44, len(LAYERS), WIDTH))).astype(np.float32)
    more = Moments.of(ScoredRows(np.arange(44), archetype_R, np.full(44, 2, np.int8), rows_RLD))
    return planted_moments()[0].merge(more)


def test_somewhat_vectors_are_among_the_components_and_never_in_the_axis() -> None:
    with_them, without = (space_of(with_somewhat(), config=ReduceConfig(somewhat=somewhat)) for somewhat in (True, False))
    assert with_them.somewhat_vector_ALD is not None
    assert np.isfinite(with_them.somewhat_vector_ALD).all(axis=(1, 2)).tolist() == [True, False, True, False, False]
    assert without.somewhat_vector_ALD is None
    np.testing.assert_array_equal(with_them.axis_LD, without.axis_LD)
    np.testing.assert_array_equal(with_them.role_vector_ALD, without.role_vector_ALD)
    assert (with_them.pca_components_LKD.shape[1], without.pca_components_LKD.shape[1]) == (4, 2)
    roles_ALD = with_them.role_vector_ALD[[0, 2, 3]]
    every_ALD = np.concatenate([roles_ALD, with_them.somewhat_vector_ALD[[0, 2]]]).astype(np.float64)
    np.testing.assert_allclose(with_them.pca_mean_LD, every_ALD.mean(axis=0), rtol=1e-6)
    assert "of score 2" in with_them.attributes["filter"]


def test_the_released_code_rounds_every_mean_and_wants_fifty_rows() -> None:
    config = ReduceConfig(preset="published-code")
    assert (config.min_count, config.somewhat) == (50, False)
    assert ReduceConfig(preset="published-code", min_count=7).min_count == 7
    moments, _ = planted_moments(rows_each=80)
    space, exact = space_of(moments, config=config), space_of(moments, config=ReduceConfig(somewhat=False))
    # As torch.stack(rows).mean(0) in bfloat16 does it: float32 inside, bfloat16 outside.
    role_ALD = exact.role_vector_ALD[[0, 2, 3]].astype(ml_dtypes.bfloat16)
    mean_LD = role_ALD.astype(np.float32).mean(axis=0).astype(ml_dtypes.bfloat16)
    axis_LD = (exact.default_vector_LD.astype(ml_dtypes.bfloat16) - mean_LD).astype(np.float32)
    np.testing.assert_array_equal(space.role_vector_ALD[[0, 2, 3]], role_ALD.astype(np.float32))
    np.testing.assert_array_equal(space.axis_LD, axis_LD)
    assert not np.array_equal(space.axis_LD, exact.axis_LD)


@pytest.mark.parametrize("pca", ["plain", "standardised", "masked"])
def test_coordinates_follow_from_what_is_stored_whatever_the_scaling(pca: Literal["plain", "standardised", "masked"]) -> None:
    space = space_of(with_a_massive_dim(), config=ReduceConfig(pca=pca, somewhat=False))
    assert space.pca_mean_LD is not None
    assert space.pca_scale_LD is not None
    roles_ALD = space.role_vector_ALD[[0, 2, 3]]
    coordinates_ALK = np.einsum("ald,lkd->alk", (roles_ALD - space.pca_mean_LD) * space.pca_scale_LD, space.pca_components_LKD)
    np.testing.assert_allclose(coordinates_ALK.var(axis=0, ddof=1), space.pca_explained_variance_LK, rtol=1e-3)
    assert (np.abs(space.pca_components_LKD[:, 0, 5]) > 0.99).all() == (pca == "plain")
    assert (space.pca_scale_LD[:, 5] == 0).all() == (pca == "masked")
    assert [set(dims) for dims in space.attributes["massive_dims"]] == [{"5"}] * len(LAYERS)


def with_a_massive_dim() -> Moments:
    """Dim 5 is fifty times the others and varies alike."""
    moments, _ = planted_moments()
    scale_D = np.where(np.arange(WIDTH) == 5, 50.0, 1.0)
    return Moments(
        {group: GroupMoments(found.count, found.mean_LD * scale_D, found.m2_LD * scale_D**2) for group, found in moments.groups.items()}
    )
