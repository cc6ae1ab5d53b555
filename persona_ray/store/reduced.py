"""Results: the group `reduced/{name}` with its arrays, and small JSON notes beside them. Write-once.

The group's own metadata come last, so a result that can be opened is complete. `reduced/latest.json` names the one in force.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from persona_ray.errors import InputError, IntegrityError, StateError
from persona_ray.spec import Reduced
from persona_ray.store.address import open_backend
from persona_ray.store.backend import METADATA_NAME, Backend
from persona_ray.store.encoding import array_objects, group_document
from persona_ray.store.layout import ArraySpec, archetype_flags, coordinate, layer_aliases
from persona_ray.store.metadata import settle
from persona_ray.store.scores import checked_name

LATEST_REDUCED_KEY = "reduced/latest.json"

_ARRAYS: Mapping[str, tuple[str, tuple[str, ...], str]] = {
    "role_vector": ("role_vector_ALD", ("archetype", "layer", "hidden"), "mean activation of each archetype's rows that pass the filter"),
    "role_count": ("role_count_A", ("archetype",), "rows that pass the filter; default Assistant: all its rows"),
    "default_vector": ("default_vector_LD", ("layer", "hidden"), "mean activation of the default Assistant's rows"),
    "axis": ("axis_LD", ("layer", "hidden"), "Assistant Axis: default_vector minus unweighted mean of role vectors"),
    "pca_components": ("pca_components_LKD", ("layer", "component", "hidden"), "unit vectors; PC1 points to the default Assistant"),
    "pca_explained_variance": ("pca_explained_variance_LK", ("layer", "component"), "variance of the role vectors along each component"),
    "pca_explained_variance_ratio": ("pca_explained_variance_ratio_LK", ("layer", "component"), "share of the total variance"),
    "cos_pc1_axis": ("cos_pc1_axis_L", ("layer",), "cosine between PC1 and the axis"),
    "somewhat_vector": ("somewhat_vector_ALD", ("archetype", "layer", "hidden"), "mean activation of each archetype's rows of score 2"),
    "pca_mean": ("pca_mean_LD", ("layer", "hidden"), "what is subtracted before the components"),
    "pca_scale": ("pca_scale_LD", ("layer", "hidden"), "what centred vectors are multiplied with before the components"),
    "rollout_pca_components": (
        "rollout_pca_components_LKD",
        ("layer", "rollout_component", "hidden"),
        "unit vectors, of single rollouts; PC1 points to the default Assistant",
    ),
    "rollout_pca_explained_variance": (
        "rollout_pca_explained_variance_LK",
        ("layer", "rollout_component"),
        "variance of single rollouts along each component",
    ),
    "rollout_pca_explained_variance_ratio": (
        "rollout_pca_explained_variance_ratio_LK",
        ("layer", "rollout_component"),
        "share of the total variance of single rollouts",
    ),
    "rollout_pca_mean": ("rollout_pca_mean_LD", ("layer", "hidden"), "mean of all stored rows"),
    "cos_rollout_pc1_axis": ("cos_rollout_pc1_axis_L", ("layer",), "cosine between PC1 of single rollouts and the axis"),
}
"""Array name -> field of `Reduced`, dims, meaning. A field that is None has no array."""
_OPTIONAL = frozenset(field.name for field in fields(Reduced) if field.default is None)


def write_reduced(url: str, reduced: Reduced) -> None:
    """Create the group `reduced/{reduced.name}`; one that is there already is left as it is.

    Raises IntegrityError if array shapes do not fit each other or attributes are not strict JSON.
    """
    backend = open_backend(url)
    folder = _folder(reduced.name)
    if backend.get_or_none(f"{folder}/{METADATA_NAME}") is not None:
        return
    group = group_document({**reduced.attributes, "name": reduced.name})
    objects = {f"{folder}/{key}": data for key, data in _array_objects(reduced).items()}
    backend.create_all(objects)
    backend.create_all({f"reduced/{METADATA_NAME}": group_document({}), f"{folder}/{METADATA_NAME}": group})


def has_reduced(backend: Backend, name: str) -> bool:
    """Whether the result `name` is there, and so complete."""
    return backend.get_or_none(f"{_folder(name)}/{METADATA_NAME}") is not None


def read_reduced(backend: Backend, name: str) -> Reduced:
    """The result `name`. Raises InputError if there is none."""
    folder = _folder(name)
    if not has_reduced(backend, name):
        raise InputError(f"{backend.url}: there is no result {name}; `persona-ray run JOB` makes one")
    group = zarr.open_group(backend.zarr_store(), path=folder, mode="r", use_consolidated=False)
    arrays = {field: _values(group, key) for key, (field, _, _) in _ARRAYS.items() if key in group or field not in _OPTIONAL}
    attributes = group.attrs.asdict()
    del attributes["name"]
    return Reduced(
        name=name,
        archetypes=tuple(str(group["archetype"].attrs["flag_meanings"]).split()),
        layers=tuple(int(layer) for layer in _values(group, "layer")),
        attributes=attributes,
        **arrays,
    )


def publish_reduced(url: str, name: str) -> None:
    """Make result `name` the one in force, unless it is. Raises StateError if it has not been written."""
    backend = open_backend(url)
    if not has_reduced(backend, name):
        raise StateError(f"{backend.url}: there is no result {name} to publish")
    latest = json.dumps({"name": name}).encode()
    if backend.get_or_none(LATEST_REDUCED_KEY) == latest:
        return
    backend.replace(LATEST_REDUCED_KEY, latest)
    settle(backend)


def write_note(url: str, name: str, key: str, value: Mapping[str, Any]) -> None:
    """A JSON object beside result `name`; one that is there already is left as it is. NaN is no JSON and raises ValueError."""
    open_backend(url).create_once(_note_key(name, key), json.dumps(value, allow_nan=False).encode())


def read_note(url: str, name: str, key: str) -> dict[str, Any] | None:
    """The JSON object, or None if there is none."""
    backend = open_backend(url)
    data = backend.get_or_none(_note_key(name, key))
    if data is None:
        return None
    try:
        note = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{backend.url}: {_note_key(name, key)} is damaged ({error})") from error
    return dict(note)


def _array_objects(reduced: Reduced) -> dict[str, bytes]:
    """Objects of all arrays, keys relative to the group."""
    sizes = _sizes(reduced)
    archetypes = np.arange(sizes["archetype"], dtype=np.int32)
    layers = np.array(reduced.layers, dtype=np.int64)
    components = np.arange(sizes["component"], dtype=np.int64)
    objects = {
        **array_objects(coordinate("archetype", archetypes, archetype_flags(reduced.archetypes)), archetypes),
        **array_objects(coordinate("layer", layers, layer_aliases()), layers),
        **array_objects(coordinate("component", components, {"long_name": "principal component, by falling variance"}), components),
    }
    if sizes["rollout_component"]:
        of_rollouts = np.arange(sizes["rollout_component"], dtype=np.int64)
        facts = {"long_name": "principal component of single rollouts, by falling variance"}
        objects |= array_objects(coordinate("rollout_component", of_rollouts, facts), of_rollouts)
    for name, (field, dims, meaning) in _ARRAYS.items():
        if getattr(reduced, field) is None:
            continue
        values = np.asarray(getattr(reduced, field))
        expected = tuple(sizes[dim] for dim in dims)
        if values.shape != expected:
            raise IntegrityError(f"result {reduced.name}: {name} is {values.shape}, but {dims} are {expected}")
        objects |= array_objects(_spec(name, dims, values, meaning), values)
    return objects


def _sizes(reduced: Reduced) -> dict[str, int]:
    """Length of each dim; the arrays are checked against it."""
    of_rollouts = reduced.rollout_pca_components_LKD
    return {
        "archetype": len(reduced.archetypes),
        "layer": len(reduced.layers),
        "component": reduced.pca_components_LKD.shape[1],
        # A dim of its own: there are as many as were asked for, however few role vectors there are.
        "rollout_component": 0 if of_rollouts is None else of_rollouts.shape[1],
        "hidden": reduced.axis_LD.shape[-1],
    }


def _spec(name: str, dims: tuple[str, ...], values: npt.NDArray[Any], meaning: str) -> ArraySpec:
    is_float = values.dtype.kind == "f"
    # One layer is one object: that is how people read them.
    chunks = tuple(1 if dim == "layer" and "hidden" in dims else max(1, size) for dim, size in zip(dims, values.shape, strict=True))
    return ArraySpec(
        name=name,
        dims=dims,
        shape=values.shape,
        dtype="float32" if is_float else "int32",
        fill=float("nan") if is_float else -1,
        chunks=chunks,
        attributes={"long_name": meaning, "units": "1"},
    )


def _values(group: zarr.Group, name: str) -> npt.NDArray[Any]:
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise IntegrityError(f"{group.path}/{name} is not an array")
    return np.asarray(array[...])


def _folder(name: str) -> str:
    return f"reduced/{checked_name(name)}"


def _note_key(name: str, key: str) -> str:
    """Not `zarr.json`, which is the group's."""
    if f"{key}.json" == METADATA_NAME:
        raise StateError("a note cannot be called zarr")
    return f"{_folder(name)}/{checked_name(key)}.json"
