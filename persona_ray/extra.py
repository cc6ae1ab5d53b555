"""More rows for archetypes that need them: what a job goes on with when all of its own rows are there.

They are further samples of the job's own prompts and questions, and a plan of their own, marked as such: its archetypes were chosen by
what their rows were like, so it is no part of the balanced order, and nothing that looks at prefixes of that order sees it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from persona_ray.planning import Setup
from persona_ray.reduce.needs import who_needs_more
from persona_ray.rollouts.wanted import further_rows
from persona_ray.spec import Plan, Reduced
from persona_ray.store.plans import Plans

log = logging.getLogger(__name__)

PURPOSE = "extra rows: archetypes chosen by how uncertain their vectors were"


@dataclass(frozen=True, slots=True)
class Extra:
    """Rows that are wanted besides those of the job."""

    setup: Setup
    """The job's, with these rows instead."""
    reasons: Mapping[str, str]
    """Archetype -> why it needs more."""


def extra_rows(setup: Setup, plans: Plans, reduced: Reduced) -> Extra | None:
    """What `reduce.extra` asks for after a result; None if it asks for nothing, or nobody needs more.

    The rows of an archetype are always the same ones, so one that got them before, and still needs more, gets no others; and
    who was once promised them is: the run may have been interrupted in the middle of it.
    """
    config, selection = setup.job.reduce.extra, setup.selection
    if config is None or selection is None:
        return None
    if setup.adds_layers(plans):
        log.warning("reduce.extra is left out: this run has added layers to rows that are there; further rows begin with the first ones")
        return None
    promised = {key.archetype for file in plans.files if file.purpose == PURPOSE for key in file.plan.keys}
    reasons = dict.fromkeys(sorted(promised), "planned before") | who_needs_more(reduced, config)
    archetypes = [archetype for archetype in selection.archetypes if archetype.name in reasons]
    if not archetypes:
        return None
    rows = further_rows(
        archetypes,
        num_prompts=selection.system_prompts,
        questions={index: selection.catalog.questions[index].text for index in selection.questions},
        first_sample=selection.samples,
        rows_each=config.rows,
        seed=setup.job.rollouts.seed,
    )
    plan = Plan(
        archetypes=setup.plan.archetypes,
        default_archetypes=setup.plan.default_archetypes,
        keys=tuple(row.key for row in rows),
        unit_rows=setup.plan.unit_rows,
        text_digests=tuple(row.text_digest for row in rows),
    )
    # The rule that ends a run early is of the balanced order.
    job = setup.job.model_copy(update={"reduce": setup.job.reduce.model_copy(update={"stop": None})})
    return Extra(replace(setup, job=job, rows=rows, plan=plan), {archetype.name: reasons[archetype.name] for archetype in archetypes})
