"""How a store grows: which rows of a job no plan has yet, and which of its layers no array has. Pure: no I/O."""

from __future__ import annotations

from persona_ray.errors import InputError
from persona_ray.spec import Plan
from persona_ray.store.plans import Plans

MAX_SHOWN = 3


def layers_to_write(plans: Plans, asked: tuple[int, ...]) -> tuple[int, ...]:
    """The set of layers that a run writes which asks for decoder blocks `asked`: those that the store began with, or further ones.

    Further ones are a set that is there already, else those that no set has yet; if every one is somewhere, the first set again.
    A job that asks for no more than the first set, but not for all of it, gets `asked` back: it is another experiment.
    """
    first = plans.layer_sets[0]
    further = tuple(layer for layer in asked if layer not in first)
    if not further:
        return asked
    same = next((layers for layers in plans.layer_sets if set(layers) == set(further)), None)
    return same or tuple(sorted(set(further).difference(plans.layers))) or first


def further_plan(plans: Plans, asked: Plan) -> Plan | None:
    """The plan to be added so that every row of `asked` is in a plan; None if all are. Order is kept.

    It begins on a border of the planned columns' chunks, so that no object of an earlier plan is touched. Raises InputError if
    a row means another text here than there, or an archetype is the default Assistant only here or only there.
    """
    _check_defaults(plans, asked)
    _check_texts(plans, asked)
    planned = {key for file in plans.files for key in file.plan.keys}
    places = [place for place, key in enumerate(asked.keys) if key not in planned]
    if not places:
        return None
    return Plan(
        archetypes=(*plans.archetypes, *(name for name in asked.archetypes if name not in set(plans.archetypes))),
        default_archetypes=tuple(dict.fromkeys((*plans.default_archetypes, *asked.default_archetypes))),
        keys=tuple(asked.keys[place] for place in places),
        unit_rows=plans.unit_rows,
        first_unit=-(-plans.files[-1].plan.units.stop // plans.chunk_units) * plans.chunk_units,
        text_digests=tuple(asked.text_digests[place] for place in places) if asked.text_digests else (),
    )


def _check_defaults(plans: Plans, asked: Plan) -> None:
    both = set(plans.archetypes) & set(asked.archetypes)
    there, here = both & set(plans.default_archetypes), both & set(asked.default_archetypes)
    if there != here:
        name = min(there ^ here)
        raise InputError(
            f"archetype {name} is the default Assistant {'in the store' if name in there else 'in the job'} alone; "
            "use a new store URL, or mark the same archetypes"
        )


def _check_texts(plans: Plans, asked: Plan) -> None:
    """One row key stands for one text."""
    if not asked.text_digests:
        return
    texts = {
        key: digest
        for file in plans.files
        if file.plan.text_digests
        for key, digest in zip(file.plan.keys, file.plan.text_digests, strict=True)
    }
    pairs = zip(asked.keys, asked.text_digests, strict=True)
    other = [key for key, digest in pairs if texts.get(key, digest) != digest]
    if other:
        names = sorted({key.archetype for key in other})
        shown = ", ".join(names[:MAX_SHOWN]) + (f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else "")
        key = other[0]
        raise InputError(
            f"{len(other)} rows of {shown} have other texts in the store than in the job (first: {key.archetype}, system prompt "
            f"{key.system_prompt}, question {key.question}); give changed archetypes another name, or use a new store URL"
        )
