"""The story of a run, from archetypes to the axis. The only file that knows all the parts.

    catalogue -> plan -> [ generate -> capture -> write -> commit ] x replicas -> judge -> reduce -> steering check

Read `run` first; everything below it is how one of its sentences is carried out. The state of a run is in its store and
nowhere else: every step looks there first, so the same command again does only what is missing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from persona_ray.catalog.load import load_catalog
from persona_ray.catalog.select import Selection, select
from persona_ray.config import Job
from persona_ray.errors import InputError, NothingUsableError
from persona_ray.judge.backends import open_judge
from persona_ray.judge.lexicon import LexiconJudge
from persona_ray.reduce.persona_space import persona_space, space_name
from persona_ray.reduce.tasks import moments_of
from persona_ray.rollouts.importing import DEFAULT_ARCHETYPE, conversations_digest, read_conversations
from persona_ray.rollouts.produce import generate_rollouts, import_rollouts
from persona_ray.rollouts.transcript import SPAN_RULE, Transcriber
from persona_ray.rollouts.wanted import opening, rows_to_generate, rows_to_import
from persona_ray.scheduler.driver import Driver, cluster
from persona_ray.scheduler.state import SchedulerState
from persona_ray.shards.actor import Replicas, ReplicaSpec, plan_stages
from persona_ray.shards.cut import cut_layers, layers_to_capture
from persona_ray.shards.source import ModelFacts, model_facts, model_location
from persona_ray.shards.stage import StageSpec
from persona_ray.spec import (
    CapturedUnit,
    Engine,
    Float32,
    GenerationRequest,
    Identity,
    Judge,
    Plan,
    ProgressCallback,
    Receipt,
    Reduced,
    Rollout,
    Row,
    RunCounts,
    Sampling,
    Spans,
    SteeringCheck,
    Unit,
)
from persona_ray.steer.check import Experiment, Request, check_steering
from persona_ray.steer.edit import AddVector
from persona_ray.store.address import absolute_url
from persona_ray.store.finish import finish_store
from persona_ray.store.ledger import Ledger
from persona_ray.store.prepare import check_store, prepare_store, stored_job
from persona_ray.store.reader import StoredRows, StoreReader, open_store
from persona_ray.store.reduced import publish_reduced, write_reduced
from persona_ray.store.scores import ScoreWriter, publish_scores
from persona_ray.store.steering import read_steering, write_steering
from persona_ray.store.writer import UnitWriter

T = TypeVar("T")

SHARD_BYTES = 64_000_000
"""What a unit should take in the store: large enough for few objects, small enough for one request."""
STORED_SHARE = 0.43
"""Stored bytes of a float32 array of bfloat16-exact values, relative to the raw ones."""
MAX_UNIT_ROWS = 256
REDUCE_TASKS = 16
"""Each holds the moments of its slice until they are merged: more tasks are more memory, and these keep any reader busy."""
BATCH_TOKENS = {"cpu": 8_192, "cuda": 32_768}
"""Padded tokens per forward batch where the job says auto."""


class Progress(Protocol):
    """Who tells people how far the run is."""

    def phase(self, name: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[ProgressCallback]:
        """One piece of long work, of `total` items called `unit`, `done` of them before."""
        ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run ends with."""

    store_url: str
    counts: RunCounts
    units_done: int
    """Units that this run computed: 0 if all were there before."""
    reduced: Reduced
    steering: SteeringCheck | None
    seconds: Mapping[str, float]
    """Wall time of this run's phases."""


def run(job: Job, progress: Progress, *, address: str | None = None) -> Outcome:
    """Run or resume a job on the Ray cluster at `address`, or on a local one that ends with the run.

    Raises InputError before anything was begun, NothingUsableError if there is no axis to be had from the rows.
    """
    clock = Clock()
    setup = prepare(job)
    url = setup.job.store.url
    check_store(url, identity=setup.identity, plan=setup.plan)
    with clock("start"), cluster(address), Replicas(setup.replica, setup.work, count=job.shards.replicas, name=job.name) as replicas:
        if setup.is_unfinished():
            with progress.phase("load the model", len(setup.replica.stages), "stages") as advance:
                replicas.check()
                advance(len(setup.replica.stages))
        prepare_store(url, identity=setup.identity, plan=setup.plan, job=setup.job.as_dict())
        store = open_store(url)
        try:
            with clock("rollouts and activations"):
                units_done = extract(setup, store, replicas, progress)
            with clock("judge"):
                judge_rollouts(setup, store, progress)
            with clock("reduce"):
                reduced = reduce_store(setup, store, progress)
            with clock("steering check"):
                steering = steer(setup, store, reduced, replicas, progress)
        finally:
            finish_store(url)
    return Outcome(url, store.ledger.counts(), units_done, reduced, steering, clock.seconds)


# ---- what the job means, before anything is begun ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A job, understood: what is wanted, by which model, cut how."""

    job: Job
    """With absolute URL, and with the choices made that it left open: the first run's, if the store is there already."""
    rows: tuple[Row, ...]
    plan: Plan
    identity: Identity
    judge: Judge | None
    selection: Selection | None
    """What was taken from the catalogue; None for imported conversations."""
    replica: ReplicaSpec
    work: ExtractUnit

    def is_unfinished(self) -> bool:
        """Whether there are units to compute, as far as the store, if there is one, can tell."""
        url = self.job.store.url
        return stored_job(url) is None or not Ledger(url).committed().issuperset(self.plan.units)

    def unit(self, index: int) -> Unit:
        """The unit's rows."""
        first = (index - self.plan.first_unit) * self.plan.unit_rows
        return Unit(index, self.rows[first : first + self.plan.unit_rows])


def prepare(job: Job) -> Setup:
    """Read the catalogue, the model's config and tokenizer, and plan. Writes nothing, starts nothing. Raises InputError."""
    location = model_location(job.model.id)
    facts = model_facts(job.model)
    layers = layers_to_capture(facts.num_layers, job.capture.wanted_layers(facts.num_layers))
    transcriber = Transcriber(location, facts.revision)
    judge = open_judge(job.judge, _lexicon_beside(location))
    rows, archetypes, defaults, selection, source = _wanted(job)
    job = _settled(job, len(rows), values_per_row=len(layers) * facts.hidden_size)
    unit_rows = int(job.store.unit_rows)
    stop_ids = _stop_ids(job, facts, transcriber)
    max_length = min(job.capture.max_length, facts.max_positions or job.capture.max_length)
    identity = Identity(
        model_id=job.model.id,
        model_revision=facts.revision,
        model_config_digest=facts.config_digest,
        tokenizer_digest=transcriber.tokenizer_digest,
        template_digest=transcriber.template_digest,
        dtype=job.model.dtype,
        attention=facts.attention,
        span_rule=SPAN_RULE,
        layers=layers,
        hidden_size=facts.hidden_size,
        rollouts={**source, "stop_ids": list(stop_ids)},
        catalog_digest=None if selection is None else selection.catalog.digest,
        max_length=max_length,
        unit_rows=unit_rows,
        store_dtype=job.store.dtype,
    )
    work = ExtractUnit(
        store_url=job.store.url,
        location=location,
        revision=facts.revision,
        sampling=_sampling(job) if job.rollouts.source == "generate" else None,
        max_length=max_length,
        batch_tokens=int(job.shards.batch_tokens),
        row_shape=(len(layers), facts.hidden_size),
    )
    return Setup(
        job=job,
        rows=rows,
        plan=Plan(archetypes, defaults, tuple(row.key for row in rows), unit_rows),
        identity=identity,
        judge=judge,
        selection=selection,
        replica=_replica(job, location, facts, layers, stop_ids),
        work=work,
    )


def _settled(job: Job, num_rows: int, values_per_row: int) -> Job:
    """The job with its URL absolute and no `auto` left in what decides the rows' bits or their place."""
    url = absolute_url(job.store.url)
    first = stored_job(url) or {"store": {}, "shards": {}}
    unit_rows, batch_tokens = job.store.unit_rows, job.shards.batch_tokens
    if unit_rows == "auto":
        unit_rows = first["store"].get("unit_rows") or _unit_rows(job, num_rows, values_per_row)
    if batch_tokens == "auto":
        batch_tokens = BATCH_TOKENS[job.shards.device]
    # The batches of the first run are kept, whatever this run's machines would take: they decide the last bits of every row.
    batch_tokens = first["shards"].get("batch_tokens") or batch_tokens
    store = job.store.model_copy(update={"url": url, "unit_rows": unit_rows})
    return job.model_copy(update={"store": store, "shards": job.shards.model_copy(update={"batch_tokens": batch_tokens})})


def _stop_ids(job: Job, facts: ModelFacts, transcriber: Transcriber) -> tuple[int, ...]:
    """What ends an answer; nothing does where answers are imported."""
    if job.rollouts.source == "import":
        return ()
    found = tuple(sorted({*facts.stop_ids, *transcriber.stop_ids}))
    if not found:
        raise InputError(f"model.id: {job.model.id}: neither config nor tokenizer names an end-of-turn token, so no answer would ever end")
    return found


def _wanted(job: Job) -> tuple[tuple[Row, ...], tuple[str, ...], tuple[str, ...], Selection | None, Mapping[str, object]]:
    """Rows in work order, archetypes by code, the default ones among them, and where the rows come from."""
    if job.rollouts.path is not None:
        conversations = read_conversations(job.rollouts.path)
        names = tuple(sorted(conversations))
        defaults = tuple(name for name in names if name == DEFAULT_ARCHETYPE)
        return rows_to_import(conversations), names, defaults, None, {"source": "import", "digest": conversations_digest(conversations)}
    selection = select(load_catalog(job.catalog.source), job.catalog)
    rows = rows_to_generate(
        selection.archetypes,
        num_prompts=selection.system_prompts,
        questions={index: selection.catalog.questions[index].text for index in selection.questions},
        samples=selection.samples,
        seed=job.rollouts.seed,
    )
    names = tuple(archetype.name for archetype in selection.archetypes)
    defaults = tuple(archetype.name for archetype in selection.archetypes if archetype.is_default)
    return rows, names, defaults, selection, job.rollouts.model_dump(mode="json", exclude={"path"})


def _unit_rows(job: Job, num_rows: int, values_per_row: int) -> int:
    """What fills a shard, and in a small run few enough for every replica to have several units."""
    fills_a_shard = int(SHARD_BYTES / (values_per_row * 4 * STORED_SHARE))
    replicas = 1 if job.shards.replicas == "auto" else job.shards.replicas
    return max(1, min(fills_a_shard, MAX_UNIT_ROWS, num_rows // (4 * replicas)))


def _replica(job: Job, location: str, facts: ModelFacts, layers: tuple[int, ...], stop_ids: tuple[int, ...]) -> ReplicaSpec:
    whole = StageSpec(
        location=location,
        revision=facts.revision,
        dtype=job.model.dtype,
        attention=facts.attention,
        first_layer=0,
        end_layer=facts.num_layers,
        num_layers=facts.num_layers,
        captured=layers,
        device=job.shards.device,
    )
    return ReplicaSpec(
        stages=plan_stages(whole, cut_layers(facts.num_layers, job.shards.stages)),
        batch_tokens=int(job.shards.batch_tokens),
        stop_ids=stop_ids,
        gpus_per_shard=job.shards.gpus_per_shard,
        accelerator=job.shards.accelerator,
        concurrent_units=job.shards.stages + 1,
    )


def _sampling(job: Job) -> Sampling:
    r = job.rollouts
    return Sampling(max_new_tokens=r.max_new_tokens, temperature=r.temperature, top_p=r.top_p, seed=r.seed)


def _lexicon_beside(location: str) -> Path | None:
    lexicon = Path(location) / "lexicon.json"
    return lexicon if lexicon.is_file() else None


# ---- rollouts and activations ------------------------------------------------------------------------------------------


def extract(setup: Setup, store: StoreReader, replicas: Replicas, progress: Progress) -> int:
    """Every row of the plan becomes a committed row of activations, or a refused one. Answers how many units were still to do."""
    committed = store.ledger.committed()
    todo = [unit for unit in setup.plan.units if unit not in committed]
    if not todo:
        return 0
    units = {index: setup.unit(index) for index in todo}
    state = SchedulerState(todo, units_per_replica=setup.replica.concurrent_units)
    done = len(setup.rows) - sum(len(unit.rows) for unit in units.values())
    with progress.phase("rollouts and activations", len(setup.rows), "rollouts", done) as advance:
        Driver(state, units, replicas.handles).run(lambda receipt: advance(receipt.num_stored + receipt.num_refused))
    return len(todo)


class _Opened(threading.local):
    """What a thread opens once and uses for all its units: a tokenizer must not be used by two threads at once."""

    def __init__(self) -> None:
        self._things: dict[tuple[object, ...], Any] = {}

    def get(self, open_: Callable[..., T], *arguments: object) -> T:
        """`open_(*arguments)`, or what that gave this thread before."""
        key = (open_, *arguments)
        if key not in self._things:
            self._things[key] = open_(*arguments)
        found: T = self._things[key]
        return found


_opened = _Opened()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractUnit:
    """What a replica does with a unit: text first, then activations from the text that is really there, then the marker."""

    store_url: str
    location: str
    revision: str | None
    sampling: Sampling | None
    """None: conversations are imported."""
    max_length: int
    batch_tokens: int
    row_shape: tuple[int, int]
    """(L, D) of a row of activations."""

    def __call__(self, unit: Unit, engine: Engine) -> Receipt:
        """Implements `shards.actor.UnitWork`."""
        began = time.perf_counter()
        sink = _opened.get(UnitWriter, self.store_url)
        rollouts = sink.read_rollouts(unit.index)
        if rollouts is None:
            rollouts = sink.write_rollouts(unit.index, self._rollouts(unit, engine))
        told = time.perf_counter()
        activations_RLD, refused = capture(rollouts, engine, self.row_shape)
        num_tokens = sum(len(rollout.token_ids) for rollout in rollouts)
        seconds = {"rollouts": round(told - began, 3), "capture": round(time.perf_counter() - told, 3)}
        made = {**engine.made, "batch_tokens": self.batch_tokens, "tokens": num_tokens, "seconds": seconds}
        sink.commit(CapturedUnit(unit.index, rollouts, activations_RLD, refused, made))
        return Receipt(unit.index, len(rollouts) - len(refused), len(refused), num_tokens, time.perf_counter() - began)

    def _rollouts(self, unit: Unit, engine: Engine) -> tuple[Rollout, ...]:
        if self.sampling is None:
            return import_rollouts(unit.rows, transcriber=self.transcriber(), max_length=self.max_length)
        return generate_rollouts(
            unit.rows, engine=engine, transcriber=self.transcriber(), sampling=self.sampling, max_length=self.max_length
        )

    def transcriber(self) -> Transcriber:
        """Of this thread."""
        return _opened.get(Transcriber, self.location, self.revision)


def capture(rollouts: Sequence[Rollout], engine: Engine, row_shape: tuple[int, int]) -> tuple[Float32, dict[int, str]]:
    """Activations (R, L, D) with NaN in refused rows, and the reasons of those by row index."""
    refused = {rollout.index: rollout.refusal for rollout in rollouts if rollout.refusal is not None}
    usable = [i for i, rollout in enumerate(rollouts) if rollout.refusal is None]
    spans = [Spans(rollouts[i].token_ids, rollouts[i].response_start, rollouts[i].response_end) for i in usable]
    activations_RLD = np.full((len(rollouts), *row_shape), np.nan, np.float32)
    for i, means_LD in zip(usable, engine.capture(spans) if spans else (), strict=True):
        if np.isfinite(means_LD).all():
            activations_RLD[i] = means_LD
        else:
            refused[rollouts[i].index] = "activations are not finite"
    return activations_RLD, refused


# ---- scores, axis, steering --------------------------------------------------------------------------------------------


def judge_rollouts(setup: Setup, store: StoreReader, progress: Progress) -> None:
    """Every committed unit gets its scores, unless it has them."""
    judge = setup.judge
    if judge is None:
        return
    todo = sorted(store.ledger.committed() - store.scored_units(judge.name))
    with progress.phase("judge", len(todo), "units") as advance:
        scores = ScoreWriter(store.url, judge.name, judge.settings)
        for unit, rollouts in zip(todo, store.rollouts(todo), strict=True):
            scores.write(unit, rollouts, judge.judge(rollouts))
            advance(1)
    publish_scores(store.url, judge.name)


def reduce_store(setup: Setup, store: StoreReader, progress: Progress) -> Reduced:
    """Role vectors, axis and principal components of what is committed; computed only if data, scores or settings are new."""
    url, config = store.url, setup.job.reduce
    judge_name = None if setup.judge is None else setup.judge.name
    ledger_digest = store.ledger.digest()
    name = space_name(ledger_digest, judge_name, config)
    if store.latest_reduced() == name:
        return store.reduced(name)
    units = sorted(store.ledger.committed())
    with progress.phase("reduce", len(units), "units") as advance:
        moments = moments_of(StoredRows(url, judge_name), units, num_tasks=REDUCE_TASKS, progress=advance)
    try:
        reduced = persona_space(
            moments,
            archetypes=setup.plan.archetypes,
            default_archetypes=setup.plan.default_archetypes,
            layers=setup.identity.layers,
            config=config,
            judge_name=judge_name,
            ledger_digest=ledger_digest,
        )
    except NothingUsableError as error:
        raise NothingUsableError(f"{error} {_refusals(store.ledger.counts())}") from error
    write_reduced(url, reduced)
    publish_reduced(url, reduced.name)
    return reduced


def _refusals(counts: RunCounts) -> str:
    reasons = "; ".join(f"{number} x {reason}" for reason, number in counts.reasons.items())
    return f"({counts.stored} of {counts.asked} rows stored, {counts.refused} refused{': ' + reasons if reasons else ''})"


def steer(setup: Setup, store: StoreReader, reduced: Reduced, replicas: Replicas, progress: Progress) -> SteeringCheck | None:
    """Does the axis move what the model says? Measured where a lexicon can count words; None elsewhere."""
    judge, selection = setup.judge, setup.selection
    if not isinstance(judge, LexiconJudge) or selection is None:
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
                default_names=setup.plan.default_archetypes,
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
    answers = replicas.generate(batches, _sampling(setup.job), advance)
    return [[transcriber.text(answer.answer_ids) for answer in batch] for batch in answers]


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
