"""Before a run: may this job fill this store? If there is none yet, create it; if it asks for more than is planned, let it grow.

A plan file is claimed by its number: created once, the first wins, and who comes second plans again what is still missing.
Only then is written what follows from it, the root last. A store whose root does not know a plan yet is simply brought up to
date by the next who comes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from persona_ray.errors import InputError, RetryableError, StateError
from persona_ray.spec import Identity, Plan
from persona_ray.store.address import absolute_url, open_backend
from persona_ray.store.backend import Backend
from persona_ray.store.empty_place import require_empty
from persona_ray.store.growth import further_plan
from persona_ray.store.identity import differing_fields
from persona_ray.store.layers_file import LayersFile, layers_key
from persona_ray.store.metadata import settle
from persona_ray.store.plan_file import PlanFile, plan_key
from persona_ray.store.plans import Plans, find_plans, read_plans

MAX_SHOWN_DIFFERENCES = 4
MAX_SHOWN_CHARS = 60


def is_store(url: str) -> bool:
    """Whether `url` is the place of a store, and not of something else."""
    return ("://" in url or Path(url).is_dir()) and stored_job(absolute_url(url)) is not None


def stored_job(url: str) -> dict[str, Any] | None:
    """The job that began the store at `url`, as it was recorded; None if there is no store yet."""
    backend = open_backend(url, is_hasty=True)
    try:
        data = backend.get_or_none(plan_key(0))
    except RetryableError as error:
        raise InputError(f"the store cannot be reached: {error}") from error
    return None if data is None else PlanFile.from_bytes(data, backend.url).job


def stored_plans(url: str) -> Plans | None:
    """The plans of the store at `url`; None if there is no store yet. Raises InputError if it cannot be reached."""
    try:
        return find_plans(open_backend(url, is_hasty=True))
    except RetryableError as error:
        raise InputError(f"the store cannot be reached: {error}") from error


def check_store(url: str, *, identity: Identity, plan: Plan, layers: Sequence[int] | None = None) -> Plans:
    """Raise InputError if this job cannot fill the store at `url`; write nothing but a probe. Answers as `preview`.

    Refused: no write access, a service that overwrites, a place that holds something else, another identity, other texts.
    """
    backend = open_backend(url, is_hasty=True)
    try:
        plans = _preview(backend, identity, plan, layers)
        backend.probe_write_once()
    except RetryableError as error:
        raise InputError(f"the store cannot be reached: {error}") from error
    return plans


def preview(url: str, *, identity: Identity, plan: Plan, layers: Sequence[int] | None = None) -> Plans:
    """The plans of the store at `url` as this job would find or leave them. Writes nothing. Raises InputError as `check_store`."""
    try:
        return _preview(open_backend(url, is_hasty=True), identity, plan, layers)
    except RetryableError as error:
        raise InputError(f"the store cannot be reached: {error}") from error


def prepare_store(
    url: str,
    *,
    identity: Identity,
    plan: Plan,
    job: Mapping[str, Any],
    layers: Sequence[int] | None = None,
    purpose: str | None = None,
) -> Plans:
    """Create the store at `url`, or add a plan with the rows of `plan` that it does not have, and complete what was interrupted.

    `layers`: a set of layers that is to be there, besides those of the identity that the store began with; for rows that are
    planned already. Answers all plans. Raises InputError as `check_store` does, before anything is written. `job` (plain JSON
    values) and `purpose` are only recorded, with a plan that is new.
    """
    check_store(url, identity=identity, plan=plan, layers=layers)
    backend = open_backend(url)
    while True:
        plans = find_plans(backend)
        wanted = plan if plans is None else further_plan(_checked(backend, plans, identity), plan)
        if wanted is None:
            return _with_layers(backend, layers, job)
        number, chunk_units = (0, None) if plans is None else (len(plans.files), plans.chunk_units)
        file = PlanFile.new(identity=identity, plan=wanted, job=job, chunk_units=chunk_units, purpose=purpose)
        # Whoever loses looks again: the winner's plan may have these rows.
        backend.create_once(plan_key(number), file.to_bytes())


def _with_layers(backend: Backend, layers: Sequence[int] | None, job: Mapping[str, Any]) -> Plans:
    """Claim the set of layers, unless it is there, and settle."""
    while True:
        plans = read_plans(backend)
        if layers is None or tuple(layers) in plans.layer_sets:
            return settle(backend)
        taken = sorted(set(layers).intersection(plans.layers))
        if taken:
            raise InputError(f"{backend.url}: layers {taken} were added by another run meanwhile; run the same command again")
        backend.create_once(layers_key(len(plans.layer_sets)), LayersFile.new(layers, job).to_bytes())


def _preview(backend: Backend, identity: Identity, plan: Plan, layers: Sequence[int] | None) -> Plans:
    _check_plan(identity, plan)
    plans = _plans_or_empty(backend)
    if plans is None:
        return Plans((PlanFile.new(identity=identity, plan=plan, job={}),))
    further = further_plan(_checked(backend, plans, identity), plan)
    is_new_set = layers is not None and tuple(layers) not in plans.layer_sets
    if further is None and not is_new_set:
        return plans
    if further is not None and layers is not None and tuple(layers) != plans.layer_sets[0]:
        raise InputError(
            f"{backend.url}: more layers are added to rows that are there, and {len(further.keys)} rows of this job are not planned "
            f"yet; run it first with the store's layers, {list(plans.layer_sets[0])}"
        )
    if further is None:
        return Plans(plans.files, (*plans.further_layers, LayersFile.new(layers or (), {})))
    file = PlanFile.new(identity=identity, plan=further, job={}, chunk_units=plans.chunk_units)
    return Plans((*plans.files, file), plans.further_layers)


def _plans_or_empty(backend: Backend) -> Plans | None:
    """The plans of the store that is there; None if nothing is. Raises InputError if something else is there."""
    plans = find_plans(backend)
    if plans is not None:
        return plans
    try:
        require_empty(backend)
    except InputError:
        plans = find_plans(backend)  # another run may have begun a store there at this very moment
        if plans is None:
            raise
    return plans


def _check_plan(identity: Identity, plan: Plan) -> None:
    if plan.first_unit != 0 or plan.unit_rows != identity.unit_rows:
        raise StateError(
            f"a job's plan begins at unit 0 with {identity.unit_rows} rows per unit (the identity's), "
            f"not at unit {plan.first_unit} with {plan.unit_rows}"
        )
    if not plan.keys:
        raise InputError("the plan has no rows; ask for at least one archetype and one question")
    spaced = next((name for name in plan.archetypes if not name or name.split() != [name]), None)
    if spaced is not None:
        raise InputError(f"archetype {spaced!r}: a name must be one word; use _ or - instead of spaces")
    if plan.text_digests and len(plan.text_digests) != len(plan.keys):
        raise StateError(f"the plan has {len(plan.keys)} rows and digests of {len(plan.text_digests)} texts")
    if len(set(plan.keys)) != len(plan.keys):
        raise StateError("the plan asks for the same row twice")
    unknown = {key.archetype for key in plan.keys}.union(plan.default_archetypes).difference(plan.archetypes)
    if unknown:
        raise StateError(f"the plan uses archetypes that it does not list: {sorted(unknown)}")


def _checked(backend: Backend, plans: Plans, identity: Identity) -> Plans:
    """`plans`, if this experiment may continue them."""
    _check_identity(backend.url, plans.identity, identity.as_dict())
    return plans


def _check_identity(url: str, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    differences = [
        f"{field.name} is {_shown(field.a)} in the store, {_shown(field.b)} in the job" for field in differing_fields(stored, asked)
    ]
    if not differences:
        return
    shown = "; ".join(differences[:MAX_SHOWN_DIFFERENCES])
    more = f"; and {len(differences) - MAX_SHOWN_DIFFERENCES} more" if len(differences) > MAX_SHOWN_DIFFERENCES else ""
    raise InputError(f"{url}: belongs to another experiment: {shown}{more}. Use a new store URL, or the settings of the store")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}..."
