"""From the rows of a store to its persona space and how sure that is: reads the store, computes on the cluster, writes the result beside.

Every step looks in the store first: what was computed from the same data, scores and settings is not computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from persona_ray.accumulating import REDUCE_TASKS, Accumulation
from persona_ray.config import ReduceConfig, reduce_config
from persona_ray.errors import InputError, NothingUsableError
from persona_ray.reduce.incremental import IncrementalPCA
from persona_ray.reduce.merging import fold_all
from persona_ray.reduce.persona_space import Block, Partly, persona_space, space_name
from persona_ray.reduce.replicates import ReplicateAxes, ReplicatePositions
from persona_ray.reduce.scatter import ExactAtSome, Scatter
from persona_ray.reduce.tasks import free_gpus, on_cluster
from persona_ray.reduce.uncertainty import certainty_of
from persona_ray.reduce.weightings import MIN_QUESTIONS, Weightings, counted_rows
from persona_ray.spec import Certainty, Progress, ProgressCallback, Reduced, RunCounts
from persona_ray.store.certainty import read_certainty, was_measured, write_certainty, write_no_certainty
from persona_ray.store.reader import StoredRows, StoreReader, open_store
from persona_ray.store.reduced import publish_reduced, write_reduced
from persona_ray.store.snapshot import Snapshot

log = logging.getLogger(__name__)

EXACT_TASKS = 4
"""Each holds three matrices of hidden x hidden: 1.6 GB at 8,192."""
CONFIDENCE = 0.9
"""Of intervals and cone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction:
    """What is to be reduced, and how."""

    config: ReduceConfig
    judge_name: str | None
    """Whose scores filter the rows; None: every row counts."""
    layers: tuple[int, ...]
    seed: int
    """Of the bootstrap."""
    num_gpus: float = 0
    """That every task which computes components of rollouts is given."""

    def accumulation(self, store: StoreReader) -> Accumulation:
        """Of the rows of `store`."""
        return Accumulation.of(store, self.config, self.judge_name, self.layers, self.num_gpus)


def reduction_of_store(
    store: StoreReader, overrides: Sequence[str] = (), *, judge_name: str | None = None, layers: Sequence[int] | None = None
) -> Reduction:
    """As the job that began the store has it, with `reduce.key=value` overrides. `judge_name` None: the judge in force; "none": no judge.

    `layers` None: all that were captured. Raises InputError for a wrong key, judge or layer.
    """
    wanted = store.layers if layers is None else tuple(layers)
    units, all_units = store.units(wanted), store.units()
    if len(units) < len(all_units):
        log.warning("%d of %d units have all of the layers %s; the others do not count", len(units), len(all_units), list(wanted))
    name = store.latest_scores() if judge_name is None else judge_name
    if judge_name not in {None, "none"} and not store.scored_units(str(judge_name)):
        raise InputError(f"{store.url}: no judge {judge_name} has scored here; the one in force is {store.latest_scores() or 'none'}")
    config = reduce_config(store.job.get("reduce", {}), overrides)
    require_exact_layers(config, wanted)
    return Reduction(
        config=config,
        judge_name=None if name == "none" else name,
        layers=wanted,
        seed=int(store.job.get("rollouts", {}).get("seed", 0)),
    )


def require_exact_layers(config: ReduceConfig, layers: Sequence[int]) -> None:
    """Raises InputError if components are to be exact at a layer that is not reduced."""
    absent = sorted(set(config.exact_layers).difference(layers))
    if absent:
        raise InputError(f"reduce.exact_layers: {absent} are not among the layers {list(layers)}")


def with_gpus(reduction: Reduction) -> Reduction:
    """For a cluster on which nothing else has a claim to the GPUs: every task takes one, if there are any.

    Raises InputError if `reduce.device` is cuda, and there is none.
    """
    wanted = reduction.config.device
    if wanted == "cpu":
        return reduction
    if free_gpus():
        return replace(reduction, num_gpus=1)
    if wanted == "cuda":
        raise InputError("reduce.device: cuda, and the cluster has no free GPU; leave it at auto, or wait until one is free")
    return reduction


def is_reduced(store: StoreReader, reduction: Reduction) -> bool:
    """Whether all of it is there already, so that no cluster is needed."""
    at = store.snapshot()
    name = space_name(at.digest, reduction.judge_name, reduction.layers, reduction.config, _partly(store, reduction, at))
    return store.reduced_or_none(name) is not None and _knows_certainty(store.url, name, reduction)


def _knows_certainty(url: str, name: str, reduction: Reduction) -> bool:
    """Whether error bars are there, are not wanted, or cannot be had."""
    return not reduction.config.bootstrap or was_measured(url, name)


def _partly(store: StoreReader, reduction: Reduction, at: Snapshot) -> Partly:
    """What the judge has left out so far, and by how much rows are read."""
    judge_name = reduction.judge_name
    scored = frozenset() if judge_name is None else store.scored_units(judge_name)
    unscored = () if judge_name is None else tuple(unit for unit in store.units(reduction.layers, at) if unit not in scored)
    return Partly(unscored, reduction.accumulation(store).units_per_leg)


def reduce_store(store: StoreReader, reduction: Reduction, progress: Progress) -> Reduced:
    """Role vectors, axis and principal components of what is committed; computed only if data, scores or settings are new.

    Raises NothingUsableError if there is no axis to be had from the rows.
    """
    url, judge_name, layers = store.url, reduction.judge_name, reduction.layers
    snapshot = store.snapshot()
    partly = _partly(store, reduction, snapshot)
    name = space_name(snapshot.digest, judge_name, layers, reduction.config, partly)
    found = store.reduced_or_none(name)
    if found is not None:
        publish_reduced(url, name)
        return found
    if partly.unscored:
        log.warning("%d units are not scored by %s yet; their rows make no role vector", len(partly.unscored), judge_name)
    store.refresh()  # another run may have added archetypes, and units of theirs
    units = store.units(layers, at=snapshot)
    accumulation = reduction.accumulation(store)
    exact = [layer for layer in layers if layer in reduction.config.exact_layers]
    try:
        with progress.phase("reduce", (len(accumulation.layer_blocks) + len(exact)) * len(units), "units") as advance:
            blocks = accumulation.blocks(units, snapshot, advance)
            reduced = persona_space(
                (_exact_at(exact, block, units, store.url, reduction, advance) for block in blocks) if exact else blocks,
                archetypes=store.archetypes,
                default_archetypes=store.default_archetypes,
                config=reduction.config,
                judge_name=judge_name,
                ledger_digest=snapshot.digest,
                partly=partly,
            )
    except NothingUsableError as error:
        raise NothingUsableError(f"{error} {_refusals(store.ledger.counts())}") from error
    store.keep(snapshot)
    write_reduced(url, reduced)
    publish_reduced(url, reduced.name)
    return reduced


def _exact_at(
    layers: Sequence[int], block: Block, units: Sequence[int], url: str, reduction: Reduction, advance: ProgressCallback
) -> Block:
    """The block with the components of these layers from their scatter, for each of which the layer is read once more."""
    assert isinstance(block.pca, IncrementalPCA)
    measure = partial(Scatter.of_unit, rank=reduction.config.rank)
    scatters = {
        place: on_cluster(
            StoredRows(url, None, (layer,), reduction.layers), units, measure, EXACT_TASKS, advance, fold_all, reduction.num_gpus
        )
        for place, layer in enumerate(block.layers)
        if layer in layers
    }
    return block._replace(pca=ExactAtSome(block.pca, scatters))


def _refusals(counts: RunCounts) -> str:
    reasons = "; ".join(f"{number} x {reason}" for reason, number in counts.reasons.items())
    return f"({counts.stored} of {counts.asked} rows stored, {counts.refused} refused{': ' + reasons if reasons else ''})"


def measure_certainty(store: StoreReader, reduction: Reduction, reduced: Reduced, progress: Progress) -> Certainty | None:
    """How sure the axis is at its best layer; None without `reduce.bootstrap`, or with rows of too few questions."""
    if _knows_certainty(store.url, reduced.name, reduction):
        return read_certainty(store.url, reduced.name)
    layer = reduced.attributes["best_layer"]
    view = open_store(store.url, at=reduced.attributes["ledger_digest"])
    rows = view.rows(reduced.layers)
    counted = counted_rows(reduced, rows.rollout_N, rows.columns, rows.scores(reduction.judge_name) if reduction.judge_name else None)
    if counted.num_questions < MIN_QUESTIONS:
        return _no_certainty(store.url, reduced.name, "the rows that count answer one question only")
    weightings = Weightings.of(counted, reduction.config.bootstrap, reduction.seed)
    axes, positions = _replicates(
        StoredRows(store.url, reduction.judge_name, (layer,), reduced.layers), view.units(reduced.layers), weightings, progress
    )
    certainty = certainty_of(axes, positions, weightings, layer=layer, names=reduced.archetypes, confidence=CONFIDENCE)
    if certainty is None:
        why = "too few of the bootstrap's replicates have an axis; the rows that count answer too few questions"
        return _no_certainty(store.url, reduced.name, why)
    write_certainty(store.url, reduced.name, certainty)
    return certainty


def _no_certainty(url: str, name: str, why: str) -> Certainty | None:
    """None, for a reason that is told and kept: it is not tried again."""
    log.warning("no error bars: %s", why)
    write_no_certainty(url, name, why)
    return None


def _replicates(
    source: StoredRows, units: tuple[int, ...], weightings: Weightings, progress: Progress
) -> tuple[ReplicateAxes, ReplicatePositions]:
    """Two passes: positions along an axis can be had only once the axis is there."""
    with progress.phase("error bars", 2 * len(units), "units") as advance:
        axes = on_cluster(source, units, partial(ReplicateAxes.of, weightings=weightings), REDUCE_TASKS, advance)
        place = partial(ReplicatePositions.of, weightings=weightings, unit_CLD=axes.unit_CLD)
        return axes, on_cluster(source, units, place, REDUCE_TASKS, advance)
