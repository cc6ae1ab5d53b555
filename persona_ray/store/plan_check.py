"""Is what follows from the plans alone what it must be: coordinates, planned columns, all metadata?

Metadata are compared as values, not as bytes, because another release of zarr may write the same otherwise. The plans are
the source of all of it and have no second copy: where they and the root disagree, one of the two is damaged, and nothing is
mended. A root that knows fewer plans than there are is no damage: the run that added one was interrupted, or is at work.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from persona_ray.errors import InputError, IntegrityError
from persona_ray.store.backend import LATEST_KEYS, METADATA_NAME, Backend
from persona_ray.store.encoding import array_document, decode_unit
from persona_ray.store.layout import ArraySpec, layer_coordinates, planned_arrays, planned_columns, root_attributes, score_array
from persona_ray.store.marker import is_in_commits, place_of_marker_key
from persona_ray.store.metadata import same_json, settle, store_objects
from persona_ray.store.plan_file import PLANS_FOLDER
from persona_ray.store.plans import Plans
from persona_ray.store.reduced import read_reduced
from persona_ray.store.snapshot import VIEWS_FOLDER, read_view
from persona_ray.store.survey import Flaw, Kind, Survey
from persona_ray.store.unit_check import UNREADABLE, unreadable

Document = dict[str, Any]


def planned_flaws(survey: Survey) -> list[Flaw]:
    """Every object outside of the units that is not what it must be: root, metadata, planned columns, strange markers, views, results."""
    flaws = _object_flaws(survey)
    root = _root_flaw(survey)
    return [
        *([root] if root else []),
        *flaws,
        *_score_metadata_flaws(survey),
        *_marker_flaws(survey),
        *_view_flaws(survey),
        *_result_flaws(survey),
    ]


def is_settled(survey: Survey) -> bool:
    """Whether the root knows all plans, and its copy of the metadata names every array. If not, the next run brings it up to date."""
    root = _document(survey.backend, METADATA_NAME)
    named = set(_inline(root))
    is_named = named.issuperset(key.removesuffix(f"/{METADATA_NAME}") for key in survey.keys if key.endswith(f"/{METADATA_NAME}"))
    return is_named and _known_plans(survey) == survey.plans


def restore_planned(survey: Survey) -> tuple[str, ...]:
    """Write anew what follows from the plans and is missing or damaged; answers the keys. Raises IntegrityError as `believe_plan`."""
    believe_plan(survey)
    backend, expected = survey.backend, store_objects(_known_plans(survey))
    damaged = [flaw.key for flaw in _object_flaws(survey)]
    for key in damaged:
        if not key.endswith(METADATA_NAME):
            backend.delete(key)
        backend.create_all({key: expected[key]})
    if _root_flaw(survey) is not None:
        damaged.append(METADATA_NAME)
        backend.replace(METADATA_NAME, expected[METADATA_NAME])
    if damaged:
        settle(backend)
    return tuple(damaged)


def believe_plan(survey: Survey) -> None:
    """Raise IntegrityError if a plan file may be the damaged one: judged by it, good units would look wrong.

    The plans must agree with the root's attributes; where these cannot be read, with the columns that were made from them.
    """
    try:
        attributes = _document(survey.backend, METADATA_NAME)["attributes"]
        differing = _differing_attributes(_known_plans(survey), attributes)
    except UNREADABLE:
        differing = [flaw.key for flaw in _object_flaws(survey) if not flaw.key.endswith(METADATA_NAME)]
    if differing:
        raise IntegrityError(
            f"{survey.backend.url}: nothing was touched, because {PLANS_FOLDER}/ and {METADATA_NAME} disagree ({', '.join(differing)}); "
            f"one of the two is damaged: bring back {PLANS_FOLDER}/ from a copy, or, if it is right, delete {METADATA_NAME}"
        )


def _known_plans(survey: Survey) -> Plans:
    """Those that the root knows, if it can be read: what a run has claimed and not yet written out is no damage."""
    try:
        attributes = _document(survey.backend, METADATA_NAME)["attributes"]
        num_plans, num_sets = int(attributes["plans"]), len(attributes["layer_sets"])
    except UNREADABLE:
        return survey.plans
    files, layers = survey.plans.files[: max(1, num_plans)], survey.plans.further_layers[: max(0, num_sets - 1)]
    return Plans(files, layers)


def _object_flaws(survey: Survey) -> list[Flaw]:
    """Of the arrays' metadata and the planned values."""
    flaws: list[Flaw] = []
    known = _known_plans(survey)
    later = store_objects(survey.plans)
    specs, values_by_name = _planned_values(known)
    for key, expected in store_objects(known).items():
        if key == METADATA_NAME:
            continue
        found = survey.backend.get_or_none(key)
        if found is None:
            flaws.append(Flaw(key, Kind.MISSING, f"what follows from {PLANS_FOLDER}/ is gone"))
        elif found != expected and not (key.endswith(METADATA_NAME) and same_json(found, later[key])):
            problem = _difference(key, found, expected, specs.get(key.partition("/")[0]), values_by_name)
            flaws += [Flaw(key, Kind.CORRUPT, problem)] if problem else []
    return flaws


def _planned_values(plans: Plans) -> tuple[dict[str, ArraySpec], dict[str, npt.NDArray[Any]]]:
    """Arrays known at planning, and what is in them."""
    specs, values = planned_arrays(plans), dict(planned_columns(plans))
    for spec, layers in layer_coordinates(plans):
        specs[spec.name], values[spec.name] = spec, layers
    return specs, values


def _difference(
    key: str, found: bytes, expected: bytes, spec: ArraySpec | None, values_by_name: Mapping[str, npt.NDArray[Any]]
) -> str | None:
    """None if other bytes say the same."""
    differs = f"differs from what {PLANS_FOLDER}/ makes of it"
    try:
        if spec is None or key.endswith(METADATA_NAME):
            return None if json.loads(found) == json.loads(expected) else differs
        values = decode_unit(spec, found, key)
    except UNREADABLE as error:
        return unreadable(error, key)
    chunk = int(key.rpartition("/")[2])
    wanted = values_by_name[spec.name][chunk * spec.chunks[0] : (chunk + 1) * spec.chunks[0]]
    return None if np.array_equal(values[: len(wanted)], wanted) else differs


def _root_flaw(survey: Survey) -> Flaw | None:
    """Attributes are the plans'; copies of metadata are those of the originals."""
    data = survey.backend.get_or_none(METADATA_NAME)
    if data is None:
        return Flaw(METADATA_NAME, Kind.MISSING, "the root of the group is gone")
    try:
        root = json.loads(data)
        attributes, copies = root["attributes"], _inline(root)
        if (root["zarr_format"], root["node_type"]) != (3, "group"):
            return Flaw(METADATA_NAME, Kind.CORRUPT, "is not the metadata of a Zarr v3 group")
        known = _known_plans(survey)
        differing = _differing_attributes(known, attributes)
    except UNREADABLE as error:
        return Flaw(METADATA_NAME, Kind.CORRUPT, unreadable(error, METADATA_NAME))
    if differing:
        return Flaw(METADATA_NAME, Kind.CORRUPT, f"{', '.join(differing)} disagree with {PLANS_FOLDER}/; one of the two is damaged")
    if known != survey.plans:
        return None  # a run is bringing it up to date, arrays first
    stale = next((name for name, copy in sorted(copies.items()) if not _is_copy(survey, name, copy)), None)
    return (
        None
        if stale is None
        else Flaw(METADATA_NAME, Kind.CORRUPT, f"its copy of {stale}/{METADATA_NAME} differs from the original; one of the two is damaged")
    )


def _differing_attributes(plans: Plans, attributes: Mapping[str, Any]) -> list[str]:
    expected = json.loads(json.dumps(root_attributes(plans)))
    return sorted(name for name in attributes.keys() | expected.keys() if attributes.get(name) != expected.get(name))


def _is_copy(survey: Survey, name: str, copy: Document) -> bool:
    """A damaged original is a flaw of its own, and no fault of the copy's."""
    try:
        original = _document(survey.backend, f"{name}/{METADATA_NAME}")
    except UNREADABLE:
        return True
    return {**original, "consolidated_metadata": None} == {**copy, "consolidated_metadata": None}


def _inline(root: Document) -> Document:
    return dict((root.get("consolidated_metadata") or {}).get("metadata", {}))


def _document(backend: Backend, key: str) -> Document:
    return dict(json.loads(backend.get(key)))


def _score_metadata_flaws(survey: Survey) -> Iterator[Flaw]:
    for judge in survey.judges:
        spec = score_array(_known_plans(survey), judge)
        key, expected = f"{spec.name}/{METADATA_NAME}", array_document(spec)
        found = survey.backend.get_or_none(key)
        if found is None:
            yield Flaw(key, Kind.MISSING, "the metadata of the scores are gone")
        elif not same_json(found, array_document(score_array(survey.plans, judge))) and (
            problem := _difference(key, found, expected, None, {})
        ):
            yield Flaw(key, Kind.CORRUPT, problem)
    for key in sorted(key for key in survey.keys if key.startswith("scores/") and key.endswith(f"/{METADATA_NAME}")):
        try:
            _document(survey.backend, key)
        except UNREADABLE as error:
            yield Flaw(key, Kind.CORRUPT, unreadable(error, key))


def _marker_flaws(survey: Survey) -> Iterator[Flaw]:
    for key in sorted(filter(is_in_commits, survey.keys)):
        place = place_of_marker_key(key)
        if place is None:
            yield Flaw(key, Kind.CORRUPT, "is no marker's name")
        elif place[0] not in survey.layer_sets:
            yield Flaw(key, Kind.CORRUPT, f"marker of an unknown set of layers: there are {len(survey.layer_sets)}")
        elif place[1] not in survey.plans:
            yield Flaw(key, Kind.CORRUPT, f"marker of an unknown unit: the plans have {survey.plans.num_units} units")


def _view_flaws(survey: Survey) -> Iterator[Flaw]:
    """A kept state must be the one of its name."""
    for key in sorted(key for key in survey.keys if key.startswith(f"{VIEWS_FOLDER}/")):
        try:
            read_view(survey.backend, key.rpartition("/")[2].removesuffix(".json"))
        except (*UNREADABLE, InputError) as error:
            yield Flaw(key, Kind.CORRUPT, unreadable(error, key))


def _result_flaws(survey: Survey) -> Iterator[Flaw]:
    """Results have no marker: their check sums are compared, and no chunk may be absent."""
    for key in sorted(LATEST_KEYS & survey.keys):
        try:
            name = str(_document(survey.backend, key)["name"])
        except UNREADABLE as error:
            yield Flaw(key, Kind.CORRUPT, unreadable(error, key))
            continue
        if not survey.has(f"{key.partition('/')[0]}/{name}/{METADATA_NAME}"):
            yield Flaw(key, Kind.CORRUPT, f"names {name}, which is not there")
    for name in sorted({key.split("/")[1] for key in survey.keys if key.startswith("reduced/") and key.count("/") > 1}):
        yield from _one_result_flaws(survey, name)


def _one_result_flaws(survey: Survey, name: str) -> Iterator[Flaw]:
    folder = f"reduced/{name}"
    if f"{folder}/{METADATA_NAME}" not in survey.keys:
        return  # its writer died, or is at work; nobody can open it
    remedy = f"delete {folder}/ and reduced/latest.json, and the next run computes it again"
    try:
        for key in (key for key in survey.keys if key.startswith(f"{folder}/") and key.endswith(f"/{METADATA_NAME}")):
            array = key.removesuffix(f"/{METADATA_NAME}")
            for absent in sorted(key for key in _chunk_keys(array, _document(survey.backend, key)) if not survey.has(key)):
                yield Flaw(absent, Kind.MISSING, remedy)
        read_reduced(survey.backend, name)
    except (*UNREADABLE, RuntimeError, FileNotFoundError) as error:
        yield Flaw(folder, Kind.CORRUPT, f"{unreadable(error, folder)}; {remedy}")


def _chunk_keys(array: str, document: Document) -> set[str]:
    """Every chunk of an array of ours; none for a group."""
    if document["node_type"] != "array":
        return set()
    counts = [-(-size // chunk) for size, chunk in zip(document["shape"], _chunk_shape(document), strict=True)]
    return {"/".join((array, "c", *map(str, place))) for place in np.ndindex(*counts)}


def _chunk_shape(document: Document) -> list[int]:
    return list(document["chunk_grid"]["configuration"]["chunk_shape"])
