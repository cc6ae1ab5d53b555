"""What one job takes from a catalogue.

Selecting never renumbers: system prompts and questions keep their positions in the full catalogue, so that a row key
means the same in a small store and in a large one. Knows nothing of units or rows.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from persona_ray.config import CatalogConfig
from persona_ray.errors import InputError
from persona_ray.spec import Archetype, Catalog


@dataclass(frozen=True, slots=True)
class Selection:
    """Which archetypes are asked which questions, under how many system prompts, how often."""

    catalog: Catalog
    """The full catalogue, which `questions` points into."""
    archetypes: tuple[Archetype, ...]
    """In the catalogue's order; every default Assistant is among them."""
    system_prompts: int
    """The first so many of every archetype; each has at least that many."""
    questions: tuple[int, ...]
    """Positions in `catalog.questions`, rising."""
    samples: int


def select(catalog: Catalog, config: CatalogConfig) -> Selection:
    """The part of `catalog` that a job's `catalog` section asks for.

    Questions are spread evenly: the i-th of n is number `i * total // n`. Raises InputError for an unknown archetype,
    and where the job asks for more system prompts or questions than there are.
    """
    archetypes = _chosen(catalog, config)
    for archetype in archetypes:
        if len(archetype.system_prompts) < config.system_prompts:
            raise InputError(
                f"catalog.system_prompts: archetype {archetype.name} has only {len(archetype.system_prompts)} system prompts, "
                f"the job asks for {config.system_prompts}"
            )
    return Selection(catalog, archetypes, config.system_prompts, _spread(len(catalog.questions), config.questions), config.samples)


def _chosen(catalog: Catalog, config: CatalogConfig) -> tuple[Archetype, ...]:
    if config.archetypes == "all":
        return catalog.archetypes
    known = [archetype.name for archetype in catalog.archetypes]
    for name in config.archetypes:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it has {len(known)} others, such as {known[0]}"
            raise InputError(f"catalog.archetypes: {name!r} is not in the catalogue; {hint}")
    return tuple(archetype for archetype in catalog.archetypes if archetype.is_default or archetype.name in config.archetypes)


def _spread(total: int, wanted: int) -> tuple[int, ...]:
    if wanted > total:
        raise InputError(f"catalog.questions: the job asks for {wanted} questions, the catalogue has {total}")
    return tuple(i * total // wanted for i in range(wanted))
