from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr

from persona_ray.errors import InputError, IntegrityError, StateError
from persona_ray.spec import Reduced
from persona_ray.store.reader import open_store
from persona_ray.store.reduced import publish_reduced, read_note, write_note, write_reduced

Tree = Callable[[Path], dict[str, bytes]]
A, L, K, D = 3, 2, 2, 6


def a_result(name: str = "r-1", seed: int = 0, **attributes: Any) -> Reduced:
    random = np.random.default_rng(seed)

    def values(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    role_vector_ALD = values(A, L, D)
    role_vector_ALD[0] = np.nan
    return Reduced(
        name=name,
        archetypes=("default", "bard", "sage"),
        layers=(0, 3),
        role_vector_ALD=role_vector_ALD,
        role_count_A=np.array([4, 3, 3], dtype=np.int32),
        default_vector_LD=values(L, D),
        axis_LD=values(L, D),
        pca_components_LKD=values(L, K, D),
        pca_explained_variance_LK=values(L, K),
        pca_explained_variance_ratio_LK=values(L, K),
        cos_pc1_axis_L=values(L),
        attributes={"ledger_digest": "ab", "best_layer": 3, "projections": {"bard": [0.5, None]}, **attributes},
    )


def with_rollouts() -> Reduced:
    """And with more components of single rollouts than there are of role vectors."""
    random = np.random.default_rng(2)
    components_LKD, variance_LK, ratio_LK, mean_LD, cosine_L = (
        random.normal(size=shape).astype(np.float32) for shape in ((L, K + 2, D), (L, K + 2), (L, K + 2), (L, D), (L,))
    )
    return replace(
        a_result(),
        rollout_pca_components_LKD=components_LKD,
        rollout_pca_explained_variance_LK=variance_LK,
        rollout_pca_explained_variance_ratio_LK=ratio_LK,
        rollout_pca_mean_LD=mean_LD,
        cos_rollout_pc1_axis_L=cosine_L,
    )


def assert_equal_results(ours: Reduced, theirs: Reduced) -> None:
    for field in fields(Reduced):
        one, other = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
        else:
            assert one == other


def test_a_result_comes_back_and_the_first_one_stays(tmp_path: Path, toy: Any, tree: Tree) -> None:
    store = open_store(toy.fill(tmp_path))
    write_reduced(store.url, a_result())
    before = tree(tmp_path)
    write_reduced(store.url, a_result(seed=1))
    assert tree(tmp_path) == before
    assert_equal_results(store.reduced("r-1"), a_result())
    with pytest.raises(InputError, match="no result other"):
        store.reduced("other")


def test_others_find_it_with_dims_and_coordinates(tmp_path: Path, toy: Any) -> None:
    toy.fill(tmp_path)
    write_reduced(str(tmp_path), a_result())
    publish_reduced(str(tmp_path), "r-1")
    dataset = xr.open_zarr(tmp_path, group="reduced/r-1", chunks=None)
    assert dict(dataset.sizes) == {"archetype": A, "layer": L, "component": K, "hidden": D}
    np.testing.assert_array_equal(dataset["axis"].sel(layer=3), a_result().axis_LD[1])
    np.testing.assert_array_equal(dataset["pca_components"].sel(component=1, layer=0), a_result().pca_components_LKD[0, 1])
    assert dataset["archetype"].attrs["flag_meanings"] == "default bard sage"
    assert dataset.attrs["best_layer"] == 3
    root = zarr.open_group(tmp_path, mode="r", use_consolidated=True)
    assert root["reduced/r-1/role_vector"].shape == (A, L, D)
    assert root["activations"].shape == (12, 2, 6)


def test_components_of_single_rollouts_have_a_dim_of_their_own(tmp_path: Path, toy: Any) -> None:
    store = open_store(toy.fill(tmp_path))
    write_reduced(store.url, with_rollouts())
    assert_equal_results(store.reduced("r-1"), with_rollouts())
    publish_reduced(store.url, "r-1")
    dataset = xr.open_zarr(tmp_path, group="reduced/r-1", chunks=None)
    assert dict(dataset.sizes) == {"archetype": A, "layer": L, "component": K, "rollout_component": K + 2, "hidden": D}
    found = dataset["rollout_pca_components"].sel(rollout_component=K + 1, layer=3)
    np.testing.assert_array_equal(found, with_rollouts().rollout_pca_components_LKD[1, K + 1])


def test_the_result_in_force_can_change(tmp_path: Path, toy: Any) -> None:
    store = open_store(toy.fill(tmp_path))
    for name in ("r-1", "r-2"):
        write_reduced(store.url, a_result(name))
        publish_reduced(store.url, name)
        assert store.latest_reduced() == name
    with pytest.raises(StateError, match="r-3"):
        publish_reduced(store.url, "r-3")


def test_a_result_that_was_cut_short_cannot_be_opened_and_is_completed(tmp_path: Path, toy: Any) -> None:
    store = open_store(toy.fill(tmp_path))
    write_reduced(store.url, a_result())
    (tmp_path / "reduced/r-1/zarr.json").unlink()
    (tmp_path / "reduced/r-1/axis/zarr.json").unlink()
    with pytest.raises(InputError, match="no result"):
        store.reduced("r-1")
    write_reduced(store.url, a_result())
    assert_equal_results(store.reduced("r-1"), a_result())


def test_what_others_could_not_read_is_refused(tmp_path: Path, toy: Any, tree: Tree) -> None:
    toy.fill(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(IntegrityError, match="NaN"):
        write_reduced(str(tmp_path), a_result(separation=[0.1, float("nan")]))
    with pytest.raises(IntegrityError, match="cos_pc1_axis"):
        write_reduced(str(tmp_path), replace(a_result(), cos_pc1_axis_L=np.zeros(5, np.float32)))
    with pytest.raises(InputError, match="cannot name"):
        write_reduced(str(tmp_path), a_result("a/b"))
    assert tree(tmp_path) == before


def test_notes_beside_a_result(tmp_path: Path, toy: Any) -> None:
    url = toy.fill(tmp_path)
    assert read_note(url, "r-1", "steering") is None
    write_note(url, "r-1", "steering", {"layer": 3, "arms": [{"label": "+axis"}]})
    write_note(url, "r-1", "steering", {"layer": 0})
    assert read_note(url, "r-1", "steering") == {"layer": 3, "arms": [{"label": "+axis"}]}
    with pytest.raises(StateError):
        write_note(url, "r-1", "zarr", {})
