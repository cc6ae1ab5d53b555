"""Is what is there right? Every unit of a store, and everything that follows from its plans, read again and compared.

Reads only, and may be used while the store grows. What it finds wrong, `repair.requeue` hands to the next run.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from persona_ray.errors import InputError
from persona_ray.spec import ProgressCallback
from persona_ray.store.address import open_backend
from persona_ray.store.plan_check import is_settled, planned_flaws
from persona_ray.store.plans import claimed_keys, keys_of
from persona_ray.store.survey import Flaw, State, Survey, UnitReport
from persona_ray.store.unit_check import check_unit

DEFAULT_WORKERS = 4
"""Each holds one unit's text and one of its other objects, decoded: a few hundred MB at full scale."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found of a store."""

    url: str
    units: tuple[UnitReport, ...]
    """Those that were looked at, by rising index."""
    num_units: int
    """Of all plans."""
    flaws: tuple[Flaw, ...]
    """Outside of the units: plan, metadata, planned columns, strange markers, results."""
    notes: tuple[str, ...]

    @property
    def is_right(self) -> bool:
        """Whether nothing is wrong with what was looked at. A unit that is not yet written is no fault."""
        return not self.flaws and not self.wrong_units

    @property
    def wrong_units(self) -> tuple[int, ...]:
        """Units to be requeued."""
        return tuple(report.unit for report in self.units if report.flaws)

    @property
    def counts(self) -> dict[State, int]:
        """Units by state."""
        found = Counter(report.state for report in self.units)
        return {state: found[state] for state in State}


def verify(
    url: str, *, sample: float | None = None, workers: int = DEFAULT_WORKERS, progress: ProgressCallback = lambda _: None
) -> Verification:
    """Check the store at `url`: all units, or a share `sample` of them (0 < sample <= 1), the same ones each time.

    Plan, metadata and the names of markers are always checked. Raises InputError if there is no store or `sample` is no share,
    IntegrityError if the plans cannot be read.
    """
    survey = Survey.of(open_backend(url))
    units = sampled_units(survey, sample)
    with ThreadPoolExecutor(workers) as pool:
        reports = []
        for report in pool.map(partial(check_unit, survey), units):
            reports.append(report)
            progress(1)
    flaws, notes = _planned(survey)
    return Verification(survey.backend.url, tuple(reports), survey.plans.num_units, tuple(flaws), notes)


def _planned(survey: Survey) -> tuple[list[Flaw], tuple[str, ...]]:
    """What is wrong outside of the units, in a store that did not grow meanwhile."""
    while True:
        flaws = planned_flaws(survey)
        if not flaws:
            is_behind = not is_settled(survey)
            return flaws, ("metadata behind: the end of the next run brings them up to date",) if is_behind else ()
        if claimed_keys(survey.backend) == keys_of(survey.plans):
            return flaws, ()
        survey = Survey.of(survey.backend)


def sampled_units(survey: Survey, sample: float | None) -> Sequence[int]:
    """Rising; spread over the store by a digest, so that a larger sample contains a smaller one. At least one unit."""
    units = survey.plans.units
    if sample is None:
        return units
    if not 0 < sample <= 1:
        raise InputError(f"sample {sample:g}: give a share of the units, above 0 and up to 1")
    order = sorted(units, key=lambda unit: hashlib.sha256(f"{survey.plans.digest}/{unit}".encode()).digest())
    return sorted(order[: math.ceil(sample * len(units))])
