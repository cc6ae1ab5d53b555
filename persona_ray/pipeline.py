"""The story of a run, from archetypes to the axis.

    catalogue -> plan -> [ generate -> capture -> write -> commit ] x replicas -> judge -> reduce -> steering check

Read `run` first; everything below it is how one of its sentences is carried out. What a job means is worked out in `planning`;
these two files are the only ones that wire the siblings together. The state of a run is in its store and
nowhere else: every step looks there first, so the same command again does only what is missing.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

from persona_ray.accumulating import KeepingUp
from persona_ray.catalog.select import Selection
from persona_ray.config import Job
from persona_ray.costs.estimate import require_a_unit
from persona_ray.errors import InputError, NothingUsableError
from persona_ray.extra import PURPOSE, Extra, extra_rows
from persona_ray.interrupt import Interruptions
from persona_ray.judge.lexicon import LexiconJudge
from persona_ray.judging import judge_store, judge_units
from persona_ray.metrics import DRIVER, recorded_by
from persona_ray.planning import Setup, expected_tokens, prepare, sampling_of
from persona_ray.reduce.convergence import LookRule
from persona_ray.reduce.vectors import Filter
from persona_ray.reducing import Reduction, measure_certainty, reduce_store, require_exact_layers
from persona_ray.rollouts.transcript import Transcriber
from persona_ray.rollouts.wanted import opening
from persona_ray.scheduler.driver import Driver, cluster
from persona_ray.scheduler.limits import over_money, over_time, within_rows
from persona_ray.scheduler.state import Rules, SchedulerState
from persona_ray.shards.actors.exporter import RayExporter
from persona_ray.shards.actors.replicas import Replicas
from persona_ray.shards.prices import required_price
from persona_ray.spec import Certainty, GenerationRequest, Progress, ProgressCallback, Reduced, RunCounts, SteeringCheck
from persona_ray.steer.check import MIN_QUESTIONS, Experiment, Request, check_steering
from persona_ray.steer.edit import AddVector
from persona_ray.stopping import AxisWatch, NeverStops, Onlooker, PrefixAxis, StopWatch, stop_rule
from persona_ray.store.finish import finish_store
from persona_ray.store.ledger import Ledger
from persona_ray.store.plans import Plans
from persona_ray.store.prepare import check_store, prepare_store
from persona_ray.store.reader import StoreReader, open_store
from persona_ray.store.steering import read_steering, write_steering

log = logging.getLogger(__name__)

STOP_WINDOW = 2
"""Units among which the next one is drawn, where the run may end early."""


@dataclass(frozen=True, slots=True)
class ExtraCounts:
    """What became of the rows besides those that the job lists."""

    counts: RunCounts
    reasons: Mapping[str, str]
    """Archetype -> why it was given more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run ends with."""

    store_url: str
    counts: RunCounts
    extra: ExtraCounts | None
    """None: not asked for, or nobody needed more."""
    units_done: int
    """Units of the job's own rows that this run computed: 0 if all were there before."""
    reduced: Reduced
    certainty: Certainty | None
    steering: SteeringCheck | None
    seconds: Mapping[str, float]
    """Wall time of this run's phases."""
    stopped: str | None
    """What ended the run before all of the job's rows were there: a limit, or an axis that holds still."""
    has_converged: bool
    """It was the axis: the same command begins nothing more."""
    num_double: int
    """Of `units_done`, those that another run on this store has committed while this one computed them."""


def run(job: Job, progress: Progress, *, address: str | None = None) -> Outcome:
    """Run or resume a job on the Ray cluster at `address`, or on a local one that ends with the run.

    Raises InputError before anything was begun, NothingUsableError if there is no axis to be had from the rows.
    """
    clock = Clock()
    setup = prepare(job)
    require_captured_layers(setup)
    url = setup.job.store.url
    plans = check_store(url, identity=setup.identity, plan=setup.plan, layers=setup.captured)
    todo = within_rows({unit: len(plans.rows(unit)) for unit in setup.units_to_do(plans)}, job.limits.rows)
    require_a_unit(setup, plans, todo)
    replicas = Replicas(setup.replica, setup.work, count=job.shards.replicas, name=job.name)
    with clock("start"), cluster(address), exported(job.name), Interruptions() as interruptions, replicas:
        if todo:
            load_model(setup, replicas, progress)
        job_facts = setup.job.as_dict()
        plans = prepare_store(url, identity=setup.identity, plan=setup.plan, job=job_facts, layers=setup.captured)
        store = open_store(url)
        try:
            with clock("rollouts and activations"):
                extracted = extract(setup, plans, replicas, progress, interruptions, watch_axis(setup, plans))
            with clock("judge"):
                judge_store(setup.judge, store, progress)
            with clock("reduce"):
                reduced = reduce_store(store, reduction_of(setup), progress)
            extra = extra_rows(setup, plans, reduced) if extracted.is_enough else None
            if extra is not None:
                with clock("extra rows"):
                    plans, reduced = go_further(extra, store, replicas, progress, interruptions)
            with clock("error bars"):
                certainty = measure_certainty(store, reduction_of(setup), reduced, progress)
            with clock("steering check"):
                steering = steer(setup, store, reduced, replicas, progress)
        finally:
            finish_store(url)
    return Outcome(
        store_url=url,
        counts=counts_of(setup, plans, store),
        extra=None if extra is None else ExtraCounts(counts_of(extra.setup, plans, store), extra.reasons),
        units_done=extracted.num_units,
        reduced=reduced,
        certainty=certainty,
        steering=steering,
        seconds=clock.seconds,
        stopped=extracted.stopped,
        has_converged=extracted.has_converged,
        num_double=extracted.num_double,
    )


def extract_only(setup: Setup, progress: Progress, *, address: str | None = None) -> RunCounts:
    """The first half of the story, for rows that nobody judges or reduces: all of them committed, or refused. Resumes as `run` does.

    Raises InputError before anything was begun, NothingUsableError if not one row could be stored.
    """
    url, identity, layers = setup.job.store.url, setup.identity, setup.captured
    plans = check_store(url, identity=identity, plan=setup.plan, layers=layers)
    if setup.units_to_do(plans):
        replicas = Replicas(setup.replica, setup.work, count=setup.job.shards.replicas, name=setup.job.name)
        with cluster(address), Interruptions() as interruptions, replicas:
            load_model(setup, replicas, progress)
            plans = prepare_store(url, identity=identity, plan=setup.plan, job=setup.job.as_dict(), layers=layers)
            try:
                extract(setup, plans, replicas, progress, interruptions)
            finally:
                finish_store(url)
    counts = counts_of(setup, plans, open_store(url))
    if not counts.stored:
        reasons = "; ".join(f"{number} x {reason}" for reason, number in counts.reasons.items())
        raise NothingUsableError(f"not one of {counts.asked} rows can be used: {reasons or 'none was begun'}")
    return counts


def exported(run: str) -> AbstractContextManager[None]:
    """What this process records goes to the cluster's exporter, for Prometheus."""
    return recorded_by(RayExporter(run=run, replica=DRIVER))


# ---- the steps, in the order of the story -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Extracted:
    """What became of the rows that were still to do."""

    num_units: int
    """Units that were computed here, or by another run meanwhile."""
    stopped: str | None
    """The limit that left some of them undone."""
    is_enough: bool
    """All of them are there, or the axis holds still; and no limit has a say in what is done besides."""
    has_converged: bool = False
    """The axis holds still, and the rows that are left are not wanted any more."""
    num_double: int = 0
    """Units that another run has committed while this one computed them."""


def load_model(setup: Setup, replicas: Replicas, progress: Progress) -> None:
    """Until one replica is there. Raises what keeps it from coming up."""
    with progress.phase("load the model", len(setup.replica.stages), "stages") as advance:
        replicas.check()
        advance(len(setup.replica.stages))


def extract(
    setup: Setup,
    plans: Plans,
    replicas: Replicas,
    progress: Progress,
    interruptions: Interruptions,
    watching: AbstractContextManager[AxisWatch] = nullcontext(NeverStops()),  # noqa: B008 - it holds nothing
) -> Extracted:
    """Every row of the job becomes a committed row of activations, or a refused one, as far as the job's limits and its axis go."""
    limits, began = setup.job.limits, time.monotonic()
    price = 0.0 if limits.money is None else required_price(setup.job)
    missing = setup.units_to_do(plans)
    todo = within_rows({unit: len(plans.rows(unit)) for unit in missing}, limits.rows)
    stopped = None if len(todo) == len(missing) else f"limits.rows: {limits.rows} in one run"
    is_free = limits.hours is limits.rows is limits.money is None
    if not todo:
        return Extracted(0, stopped, is_enough=stopped is None)
    units = {index: setup.unit(plans, index) for index in todo}
    state = SchedulerState(
        {index: len(unit.rows) for index, unit in units.items()},
        work={index: float(sum(map(expected_tokens, unit.rows))) for index, unit in units.items()},
        rules=rules_for(setup),
        has_succeeded=len(todo) < len(setup.units(plans)),
    )
    others = Ledger(setup.job.store.url, plans.set_of(setup.captured))
    total = sum(len(plans.rows(unit)) for unit in setup.units(plans))
    done = total - sum(len(unit.rows) for unit in units.values())
    with (
        progress.phase("rollouts and activations", total, "rollouts", done) as advance,
        interruptions.drained(),
        watching as axis,
        keep_moments(setup),
    ):
        driver = Driver(
            state,
            units,
            replicas,
            others,
            stop_reason=lambda: (
                interruptions.reason
                or axis.reason
                or over_time(time.monotonic() - began, limits.hours)
                or over_money(replicas.device_hours * price, limits.money)
            ),
        )
        driver.run(lambda receipt: advance(receipt.num_stored + receipt.num_refused))
        holds_still = axis.reason is not None
    stopped = state.stop_reason or stopped
    # A run that found its axis at rest has begun nothing, and so has used up no limit.
    is_enough = (is_free or not state.stored) and (stopped is None or holds_still)
    return Extracted(len(state.stored), stopped, is_enough, has_converged=holds_still, num_double=len(driver.double))


def go_further(
    extra: Extra, store: StoreReader, replicas: Replicas, progress: Progress, interruptions: Interruptions
) -> tuple[Plans, Reduced]:
    """Extra rows as a plan of their own, and the result with them."""
    setup = extra.setup
    for name, reason in extra.reasons.items():
        log.info("%s gets %d rows more: %s", name, len(setup.rows) // len(extra.reasons), reason)
    facts = setup.job.as_dict()
    plans = prepare_store(setup.job.store.url, identity=setup.identity, plan=setup.plan, job=facts, layers=setup.captured, purpose=PURPOSE)
    extract(setup, plans, replicas, progress, interruptions)
    store.refresh()
    judge_store(setup.judge, store, progress)
    return plans, reduce_store(store, reduction_of(setup), progress)


def rules_for(setup: Setup) -> Rules:
    """What the scheduler goes by in this run. Every run draws in an order of its own, so that two on one store share the work."""
    return Rules(
        leases_per_replica=setup.replica.concurrent_units,
        parts=Rules().parts if setup.work.sampling else 1,
        seed=secrets.randbits(32),
        # What lies beyond the complete prefix when the axis holds still was done for nothing.
        window=Rules().window if setup.job.reduce.stop is None else STOP_WINDOW,
    )


def require_captured_layers(setup: Setup) -> None:
    """Raises InputError if the stopping rule looks at a layer that is not captured, or components are to be exact at one."""
    require_exact_layers(setup.job.reduce, setup.layers)
    stop = setup.job.reduce.stop
    absent = [] if stop is None or stop.layers is None else sorted(set(stop.layers) - set(setup.layers))
    if absent:
        raise InputError(f"reduce.stop.layers: {absent} are not among the captured layers {list(setup.layers)}")


def watch_axis(setup: Setup, plans: Plans) -> AbstractContextManager[AxisWatch]:
    """Follows the axis while the store fills: for whoever watches, and to end when it holds still, if the job wants that."""
    config = setup.job.reduce.stop
    if setup.adds_layers(plans):
        if config is not None:
            log.warning("reduce.stop is left out: more layers are added to rows that are there, and each of them is wanted")
        return nullcontext(NeverStops())
    store = open_store(setup.job.store.url)
    reduction = reduction_of(setup)
    prefix = PrefixAxis(
        store=store,
        order=setup.units(plans),
        archetypes=setup.plan.archetypes,
        keep=Filter(setup.job.reduce.min_score if reduction.judge_name else None, setup.job.reduce.min_count),
        judge_name=reduction.judge_name,
        judge=partial(judge_units, setup.judge, store),
        layers=(config and config.layers) or (setup.layers[len(setup.layers) // 2],),
        rule=LookRule(setup.job.reduce.min_count) if config is None else stop_rule(config),
    )
    return Onlooker(prefix) if config is None else StopWatch(prefix)


def keep_moments(setup: Setup) -> KeepingUp:
    """Takes the moments of what is committed while the run goes on, so that little is left to read when it ends."""
    store = open_store(setup.job.store.url)
    return KeepingUp(reduction_of(setup).accumulation(store), partial(judge_units, setup.judge, store))


def reduction_of(setup: Setup) -> Reduction:
    """What is reduced, and how."""
    return Reduction(
        config=setup.job.reduce,
        judge_name=None if setup.judge is None else setup.judge.name,
        layers=setup.layers,
        seed=setup.job.rollouts.seed,
    )


def counts_of(setup: Setup, plans: Plans, store: StoreReader) -> RunCounts:
    """What became of the rows that the job asked for, whichever run stored them."""
    wanted = {row.key for row in setup.rows}
    placed = ((row, key) for unit in setup.units(plans) for row, key in zip(plans.rows(unit), plans.keys(unit), strict=True))
    return store.counts(row for row, key in placed if key in wanted)


def steer(setup: Setup, store: StoreReader, reduced: Reduced, replicas: Replicas, progress: Progress) -> SteeringCheck | None:
    """Does the axis move what the model says? Measured where a lexicon can count words, over two questions or more; None elsewhere."""
    judge, selection = setup.judge, setup.selection
    if not isinstance(judge, LexiconJudge) or selection is None or len(selection.questions) < MIN_QUESTIONS:
        return None
    done = read_steering(store.url, reduced.name)
    if done is not None:
        return done
    with progress.phase("steering check", 0, "answers") as advance:
        check = check_steering(
            Experiment(
                axis_LD=reduced.axis_LD,
                layers=reduced.layers,
                separation_L=reduced.attributes["separation"],
                projections={name: by_layer[_best_place(reduced)] for name, by_layer in reduced.attributes["projections"].items()},
                default_names=store.default_archetypes,
                questions={index: selection.catalog.questions[index].text for index in selection.questions},
                ask=partial(_ask, setup, selection, replicas, advance),
                count_words=judge.assistant_share,
                make_edit=AddVector,
                seed=setup.job.rollouts.seed,
            )
        )
    write_steering(store.url, reduced.name, check)
    return check


def _best_place(reduced: Reduced) -> int:
    return reduced.layers.index(reduced.attributes["best_layer"])


def _ask(setup: Setup, selection: Selection, replicas: Replicas, advance: ProgressCallback, requests: Sequence[Request]) -> list[list[str]]:
    """Answers under edits; the same question draws the same random numbers under every edit, so that answers pair."""
    transcriber = setup.work.transcriber()
    batches = [
        ([_steering_request(selection, transcriber, name, question) for name, question in asked], () if edit is None else (edit,))
        for asked, edit in requests
    ]
    answers = replicas.generate(batches, sampling_of(setup.job), advance)
    return [
        [transcriber.generated(request.prompt_ids, answer.answer_ids).response for request, answer in zip(batch, given, strict=True)]
        for (batch, _), given in zip(batches, answers, strict=True)
    ]


def _steering_request(selection: Selection, transcriber: Transcriber, name: str, question: int) -> GenerationRequest:
    archetype = next(archetype for archetype in selection.archetypes if archetype.name == name)
    system_prompt = archetype.system_prompts[question % selection.system_prompts]
    conversation = opening(system_prompt, selection.catalog.questions[question].text)
    return GenerationRequest(f"steering/{name}/{question}", transcriber.prompt_ids(conversation))


class Clock:
    """Wall seconds by phase, nested phases counted once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time what happens inside."""
        began = time.perf_counter()
        before = sum(self.seconds.values())
        try:
            yield
        finally:
            inner = sum(self.seconds.values()) - before
            self.seconds[phase] = round(time.perf_counter() - began - inner, 3)
