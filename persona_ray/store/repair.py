"""The one exception to write-once: what is wrong is taken out of the ledger, so that the next run makes it again; and leftovers.

Order of a requeue: the marker is copied to the quarantine, with the digests of the damaged objects; the marker is deleted;
then the `committed` chunk, scores and objects, the last written first. Killed anywhere, it can be repeated: the object that
was damaged goes last of all, and while it is there it is known by its digest. No run may be at work on the store meanwhile.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from persona_ray.errors import InputError
from persona_ray.spec import ProgressCallback
from persona_ray.store.address import open_backend
from persona_ray.store.backend import ListedObject
from persona_ray.store.checkpoint import superseded
from persona_ray.store.marker import Marker, is_in_commits, marker_key, place_of_marker_key
from persona_ray.store.plan_check import believe_plan, restore_planned
from persona_ray.store.quarantine import quarantine, unit_of_quarantine
from persona_ray.store.survey import Survey, UnitReport
from persona_ray.store.unit_check import check_unit

DAY_S = 86_400.0
_UNIT_OBJECT = re.compile(
    r"rollouts/part-(\d{6,})\.parquet"
    r"|activations(?:_(?P<numbers>\d+))?/c/(\d+)/0/0|(?:response_tokens|finish_reason|status)/c/(\d+)"
    r"|committed(?:_(?P<mask>\d+))?/c/(\d+)"
    r"|scores/[^/]+/(?:raw/part-(\d{6,})\.parquet|score/c/(\d+))"
)

_SET_GROUPS = frozenset({_UNIT_OBJECT.groupindex["numbers"], _UNIT_OBJECT.groupindex["mask"]})


@dataclass(frozen=True, slots=True)
class Requeued:
    """What was done about one unit."""

    unit: int
    is_redone: bool
    """Whether the next run computes the unit again; otherwise its rows were right, or never committed."""
    keeps_text: bool
    """Whether the next run captures from the text that is there."""
    deleted: tuple[str, ...]
    """In the order of deletion. Empty: nothing was wrong."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """An object that belongs to nothing."""

    key: str
    num_bytes: int
    age_s: float
    why: str


@dataclass(frozen=True, slots=True)
class Collection:
    """What `gc` found."""

    leftovers: tuple[Leftover, ...]
    is_deleted: bool
    kept: tuple[str, ...]
    """What was left alone on purpose, in words."""


# ---- requeue ----------------------------------------------------------------------------------------------------------


def requeue(url: str, units: Iterable[int], *, progress: ProgressCallback = lambda _: None) -> tuple[Requeued, ...]:
    """Take what is wrong with `units` out of the store, so that the next run makes it again. A unit that is right is left as it is.

    Intact text stays, and so do intact objects written before the first damaged one; scores go only with their text or if they
    are wrong themselves. Raises InputError for a unit that the plan does not have, IntegrityError if the plan itself is in doubt.
    """
    survey = Survey.of(open_backend(url))
    believe_plan(survey)
    wanted = sorted(set(units))
    strangers = [unit for unit in wanted if unit not in survey.plans]
    if strangers:
        raise InputError(f"{url}: units {strangers} are in no plan; there are {survey.plans.num_units} units")
    done = []
    for unit in wanted:
        done.append(_requeue(survey, check_unit(survey, unit)))
        progress(1)
    return tuple(done)


def restore(url: str) -> tuple[str, ...]:
    """Write anew what follows from the plan and is missing or damaged: metadata, coordinates, planned columns. Answers the keys."""
    return restore_planned(Survey.of(open_backend(url)))


def _requeue(survey: Survey, report: UnitReport) -> Requeued:
    """Further sets of layers first: their numbers came after those of the first set."""
    flawed = {flaw.key for flaw in report.flaws}
    deleted: list[str] = []
    is_redone = False
    for layer_set in reversed(survey.layer_sets):
        doomed, is_committed = _take_out(survey, report.unit, layer_set, flawed)
        deleted += doomed
        is_redone |= is_committed
    keeps_text = survey.own_keys(report.unit)[0] not in flawed
    return Requeued(report.unit, is_redone, keeps_text=keeps_text, deleted=tuple(deleted))


def _take_out(survey: Survey, unit: int, layer_set: int, flawed: set[str]) -> tuple[list[str], bool]:
    """What was deleted for one set of layers, and whether a marker was."""
    backend, key = survey.backend, marker_key(unit, layer_set)
    own = survey.own_keys(unit, layer_set)
    marker = backend.get_or_none(key)
    is_redone = marker is not None and not flawed.isdisjoint((key, *own))
    doomed = [item for item in _doomed(survey, unit, layer_set, flawed, with_mask=is_redone) if item in survey.keys]
    if is_redone:
        quarantine(backend, unit, marker, _condemned(survey, unit, layer_set, marker, flawed))
        doomed = [key, *doomed]
    for item in doomed:
        backend.delete(item)
    return doomed, is_redone


def _doomed(survey: Survey, unit: int, layer_set: int, flawed: set[str], *, with_mask: bool) -> Iterator[str]:
    """The last written first, so that nothing is ever there without what it was made from."""
    own = survey.own_keys(unit, layer_set)
    mask = survey.committed_key(unit, layer_set)
    if with_mask or mask in flawed:
        yield mask
    for judge in survey.judges if layer_set == 0 else ():
        raw, scores = survey.score_keys(judge, unit)
        if own[0] in flawed or not flawed.isdisjoint((raw, scores)):
            yield scores
        if own[0] in flawed or raw in flawed:
            yield raw
    first = next((place for place, key in enumerate(own) if key in flawed), len(own))
    # The text is everybody's: it goes with the first set, which comes last.
    yield from reversed(own[first if layer_set == 0 else max(first, 1) :])


def _condemned(survey: Survey, unit: int, layer_set: int, marker: bytes | None, flawed: set[str]) -> dict[str, str]:
    """Key -> SHA-256 of the unit's objects that are not those of its marker. A damaged marker says nothing about them."""
    key = marker_key(unit, layer_set)
    if marker is None or key in flawed:
        return {}
    records = Marker.from_bytes(marker, key).objects
    found = {item: survey.backend.get_or_none(item) for item in survey.own_keys(unit, layer_set) if item in flawed}
    digests = {item: hashlib.sha256(data).hexdigest() for item, data in found.items() if data is not None}
    return {item: sha256 for item, sha256 in digests.items() if sha256 != records[item].sha256}


# ---- leftovers --------------------------------------------------------------------------------------------------------


def gc(url: str, *, delete: bool, texts: bool = False, min_age_s: float = DAY_S, clock: Callable[[], float] = time.time) -> Collection:
    """List what belongs to nothing, and remove it if `delete`; only what is older than `min_age_s`.

    Leftovers are numbers of units that never committed, the quarantine of units that are committed again, statistics that later
    ones include, and half-made temporary files. Never anything of a unit that has a marker, and text of units that have none (a
    crash must not waste what was generated) only with `texts`. Numbers are left alone while anything of the store is younger than
    `min_age_s`: a run may be at work. Raises InputError if there is no store.
    """
    survey = Survey.of(open_backend(url))
    listed, now_s = survey.backend.list_objects(""), clock()
    marked = frozenset(place for place in map(place_of_marker_key, survey.keys) if place is not None)
    unmarked = _unmarked(listed, marked)
    numbers = [item for item in unmarked if texts or not _is_text(item.key)]
    kept: list[str] = []
    if len(numbers) < len(unmarked):
        kept.append(f"text and scores of units without a marker ({len(unmarked) - len(numbers)} in number): the next run goes on from them")
    quiet_s = now_s - max((item.modified_s for item in listed if _is_work(item.key)), default=0)
    if numbers and quiet_s < min_age_s:
        written = f"something was written {max(quiet_s, 0):.0f} s ago, perhaps by a run"
        kept.append(f"objects of units without a marker ({len(numbers)} in number): {written}")
        numbers = []
    leftovers = [
        *(_leftover(item, now_s, f"{_named(item.key)} has no marker") for item in numbers),
        *(
            _leftover(item, now_s, why)
            for item, why in [*_finished_quarantine(listed, marked), *_superseded(survey, listed), *_temporary(survey)]
            if now_s - item.modified_s >= min_age_s
        ),
    ]
    if delete:
        _delete(survey, leftovers)
    return Collection(tuple(leftovers), delete, tuple(kept))


def _delete(survey: Survey, leftovers: Sequence[Leftover]) -> None:
    """The last written first. A unit that was committed since the listing keeps everything."""
    is_free: dict[tuple[int, int], bool] = {}
    for leftover in reversed(leftovers):
        place = place_of_object(leftover.key)
        if place is not None and place not in is_free:
            is_free[place] = survey.backend.get_or_none(marker_key(place[1], place[0])) is None
        if place is None or is_free[place]:
            survey.backend.delete(leftover.key)


def place_of_object(key: str) -> tuple[int, int] | None:
    """Set of layers and unit whose text, numbers, mask or scores are at `key`; None for any other object."""
    match = _UNIT_OBJECT.fullmatch(key)
    if match is None:
        return None
    named = match.groupdict()
    unit = next(group for place, group in enumerate(match.groups(), 1) if group is not None and place not in _SET_GROUPS)
    return int(named["numbers"] or named["mask"] or 0), int(unit)


def _named(key: str) -> str:
    place = place_of_object(key)
    assert place is not None
    return f"unit {place[1]:06d}" + (f" of layer set {place[0]}" if place[0] else "")


def _leftover(item: ListedObject, now_s: float, why: str) -> Leftover:
    return Leftover(item.key, item.num_bytes, now_s - item.modified_s, why)


def _unmarked(listed: Sequence[ListedObject], marked: frozenset[tuple[int, int]]) -> list[ListedObject]:
    """Objects of units without a marker; of each unit the text first."""
    found = [(place, item) for item in listed if (place := place_of_object(item.key)) is not None and place not in marked]
    return [item for _, item in sorted(found, key=lambda pair: (pair[0], not pair[1].key.startswith("rollouts/"), pair[1].key))]


def _finished_quarantine(listed: Sequence[ListedObject], marked: frozenset[tuple[int, int]]) -> Iterator[tuple[ListedObject, str]]:
    """Of units that are committed again, with all layers that any unit has."""
    sets = {layer_set for layer_set, _ in marked}
    for item in listed:
        unit = unit_of_quarantine(item.key)
        if unit is not None and all((layer_set, unit) in marked for layer_set in sets):
            yield item, f"quarantine of unit {unit:06d}, which is committed again"


def _superseded(survey: Survey, listed: Sequence[ListedObject]) -> Iterator[tuple[ListedObject, str]]:
    keys = frozenset(superseded(survey.backend))
    yield from ((item, "statistics of rows that later ones include") for item in listed if item.key in keys)


def _temporary(survey: Survey) -> Iterator[tuple[ListedObject, str]]:
    for item in survey.backend.list_temporary():
        yield item, "half-made temporary file"


def _is_text(key: str) -> bool:
    """Text, and what follows from text alone."""
    return key.startswith(("rollouts/", "scores/"))


def _is_work(key: str) -> bool:
    return place_of_object(key) is not None or is_in_commits(key)
