"""What a job means, before anything is begun: which rows, by which model, cut how, into which store.

Reads the catalogue or the conversations, the model's config and tokenizer, and the plan of a store that is there already.
Writes nothing and starts nothing, so everything that is wrong with a job's input comes out here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from persona_ray.catalog.load import load_catalog
from persona_ray.catalog.select import Selection, select
from persona_ray.config import Job
from persona_ray.errors import InputError, StateError
from persona_ray.judge.backends import open_judge
from persona_ray.rollouts.extract import ExtractUnit
from persona_ray.rollouts.importing import DEFAULT_ARCHETYPE, ImportedConversation, read_conversations, rollouts_as_conversations
from persona_ray.rollouts.transcript import SPAN_RULE, Transcriber
from persona_ray.rollouts.wanted import generated_row, rows_to_generate, rows_to_import
from persona_ray.shards.cut import Cut, layers_to_capture
from persona_ray.shards.fetch import fetch_config
from persona_ray.shards.fitting import BATCH_TOKENS, fit_replica
from persona_ray.shards.plan import ReplicaSpec, StageSpec
from persona_ray.shards.size import ModelSize
from persona_ray.shards.source import ModelFacts, config_folder, model_facts, model_location
from persona_ray.spec import Archetype, Identity, Judge, Plan, Question, Row, RowKey, Sampling, Unit
from persona_ray.store.address import absolute_url
from persona_ray.store.growth import layers_to_write
from persona_ray.store.ledger import Ledger
from persona_ray.store.plans import Plans
from persona_ray.store.prepare import is_store, preview, stored_job, stored_plans
from persona_ray.store.reader import open_store
from persona_ray.store.writer import UnitWriter

log = logging.getLogger(__name__)

SHARD_BYTES = 64_000_000
"""What a unit should take in the store: large enough for few objects, small enough for one request."""
STORED_SHARE = 0.43
"""Stored bytes of a float32 array of bfloat16-exact values, relative to the raw ones."""
MAX_UNIT_ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A job, understood: what is wanted, by which model, cut how."""

    job: Job
    """With absolute URL, and with the choices made that it left open: the first run's, if the store is there already."""
    rows: tuple[Row, ...]
    """What the job asks for, in work order. Their places in the store are the plans' to say."""
    row_of: Callable[[RowKey], Row | None]
    """A row by its key, whether the job asks for it or not: units hold rows of other runs. None: its texts are not known here."""
    plan: Plan
    """The rows as a plan: that of the store, if this job is the first to fill it."""
    identity: Identity
    judge: Judge | None
    selection: Selection | None
    """What was taken from the catalogue; None for imported conversations."""
    size: ModelSize
    cut: Cut
    """How one replica is cut over GPUs, in numbers."""
    replica: ReplicaSpec
    work: ExtractUnit
    layers: tuple[int, ...]
    """Decoder blocks that the job asks for, and whose axis it wants."""
    captured: tuple[int, ...]
    """Those that this run writes: all that the store began with, or further ones for rows that are there."""

    def plans(self) -> Plans:
        """All plans of the store, as this job finds them or would leave them. Writes nothing. Raises InputError."""
        return preview(self.job.store.url, identity=self.identity, plan=self.plan, layers=self.captured)

    def units(self, plans: Plans) -> list[int]:
        """Units that hold rows of this job, in work order."""
        wanted = {row.key for row in self.rows}
        return [unit for unit in plans.units if not wanted.isdisjoint(plans.keys(unit))]

    def adds_layers(self, plans: Plans) -> bool:
        """Whether this run writes further layers of rows that are there, and not rows."""
        return self.captured != plans.layer_sets[0]

    def units_to_do(self, plans: Plans) -> list[int]:
        """Those of them without a marker that can be done here; all of them if there is no store yet.

        Raises InputError if further layers are asked for, and not all of the job's rows are there.
        """
        if stored_job(self.job.store.url) is None:
            return self.units(plans)
        layer_set = plans.set_of(self.captured)
        committed = Ledger(self.job.store.url, layer_set).committed()
        missing = [unit for unit in self.units(plans) if unit not in committed]
        if layer_set:
            self._require_rows(plans, missing)
        possible = [unit for unit in missing if self._knows(plans, unit)]
        if len(possible) < len(missing):
            log.warning(
                "%d units are left to the run that planned them: they hold rows whose texts are not among this job's",
                len(missing) - len(possible),
            )
        return possible

    def _require_rows(self, plans: Plans, units: Sequence[int]) -> None:
        """Further layers are captured from the text of rows that are committed."""
        absent = set(units) - Ledger(self.job.store.url).committed()
        if absent:
            raise InputError(
                f"{self.job.store.url}: more layers are added to rows that are there, and {len(absent)} units of this job are not "
                f"committed yet; finish the run with capture.layers {list(plans.layer_sets[0])} first"
            )

    def facts(self) -> dict[str, Any]:
        """The plan in plain JSON values: what is asked for, and the replica that will do it."""
        shards, replica, plans = self.job.shards, self.replica, self.plans()
        return {
            "name": self.job.name,
            "model": self.job.model.id,
            "store": self.job.store.url,
            "rollouts": len(self.rows),
            "archetypes": len(self.plan.archetypes),
            "units": len(self.units(plans)),
            "units_to_do": len(self.units_to_do(plans)),
            "unit_rows": self.plan.unit_rows,
            "layers": len(self.captured),
            "hidden": self.identity.hidden_size,
            "dtype": self.identity.dtype,
            "attention": self.identity.attention,
            "replicas": shards.replicas,
            "tensor_parallel": shards.tensor_parallel,
            "gpus_per_replica": shards.gpus_per_shard * replica.num_shards,
            "accelerator": shards.accelerator,
            "transport": shards.transport,
            "capture_batch_tokens": replica.batch_tokens,
            "generation_batch_tokens": replica.decode_tokens if self.job.rollouts.source == "generate" else None,
            "stages": self.cut.rows(),
            "note": self.cut.note,
        }

    def unit(self, plans: Plans, index: int) -> Unit:
        """The unit's rows, at their places in the store. Raises StateError for a unit that is not among `units_to_do`."""
        rows = [self.row_of(key) for key in plans.keys(index)]
        placed = tuple(replace(row, index=place) for place, row in zip(plans.rows(index), rows, strict=True) if row is not None)
        if len(placed) < len(rows):
            raise StateError(f"unit {index:06d} holds rows whose texts are not known here")
        return Unit(index, placed)

    def _knows(self, plans: Plans, unit: int) -> bool:
        """Whether every row of the unit can be asked as its plan meant it."""
        rows = [self.row_of(key) for key in plans.keys(unit)]
        digests = plans.text_digests(unit) or [None] * len(rows)
        return all(row is not None and digest in {None, row.text_digest} for row, digest in zip(rows, digests, strict=True))


def prepare(job: Job) -> Setup:
    """Read the catalogue, the model's config and tokenizer, and plan. Writes nothing, starts nothing. Raises InputError."""
    location = model_location(job.model.id)
    facts = model_facts(job.model, job.shards.tensor_parallel)
    asked = layers_to_capture(facts.num_layers, job.capture.wanted_layers(facts.num_layers))
    transcriber = Transcriber(str(config_folder(job.model)), None, job.model.kind, job.rollouts.thinking)
    judge = open_judge(job.judge, lexicon_of(job.model.id))
    wanted = _wanted(job)
    job = _settled(job, len(wanted.rows), values_per_row=len(asked) * facts.hidden_size)
    first, layers = _layers(job.store.url, asked)
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
        layers=first,
        hidden_size=facts.hidden_size,
        rollouts={**wanted.source, "stop_ids": list(stop_ids), "instruction_turn": transcriber.instruction_turn},
        max_length=max_length,
        unit_rows=unit_rows,
        store_dtype=job.store.dtype,
    )
    work = ExtractUnit(
        open_sink=partial(UnitWriter, job.store.url, None if layers == first else layers),
        find_tokenizer=partial(fetch_config, location, facts.revision),
        kind=job.model.kind,
        thinking=job.rollouts.thinking,
        sampling=sampling_of(job) if job.rollouts.source == "generate" else None,
        max_length=max_length,
        batch_tokens=int(job.shards.batch_tokens),
        row_shape=(len(layers), facts.hidden_size),
    )
    cut, replica = fit_replica(
        facts.size,
        _whole_model(job, location, facts, layers),
        job.shards,
        context=max_length,
        max_new_tokens=job.rollouts.max_new_tokens,
        stop_ids=stop_ids,
    )
    for stage in cut.rows():
        log.info("stage %(stage)s: layers %(layers)s, %(weights_gb)s GB of weights, %(flops_percent)s %% of the FLOPs", stage)
    return Setup(
        job=job,
        rows=wanted.rows,
        row_of=wanted.row_of,
        plan=Plan(
            archetypes=wanted.archetypes,
            default_archetypes=wanted.defaults,
            keys=tuple(row.key for row in wanted.rows),
            unit_rows=unit_rows,
            text_digests=tuple(row.text_digest for row in wanted.rows),
        ),
        identity=identity,
        judge=judge,
        selection=wanted.selection,
        size=facts.size,
        cut=cut,
        replica=replica,
        work=work,
        layers=asked,
        captured=layers,
    )


def _layers(url: str, asked: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Those that the store began with, and those that this run writes."""
    plans = stored_plans(url)
    written = asked if plans is None else layers_to_write(plans, asked)
    is_other = plans is not None and set(written).issubset(plans.layer_sets[0])  # another experiment, unless it is the whole set
    return (written if plans is None or is_other else plans.layer_sets[0]), written


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """Rows in work order, archetypes by code, the default ones among them, and where the rows come from."""

    rows: tuple[Row, ...]
    archetypes: tuple[str, ...]
    defaults: tuple[str, ...]
    row_of: Callable[[RowKey], Row | None]
    selection: Selection | None
    source: Mapping[str, object]


def _wanted(job: Job) -> _Wanted:
    return _from_catalog(job) if job.rollouts.path is None else _from_elsewhere(job.rollouts.path)


def _from_elsewhere(path: str) -> _Wanted:
    """Conversations that were had before: by another run, in its store, or by another tool, in the published layout."""
    if is_store(path):
        other = open_store(absolute_url(path))
        taken = rollouts_as_conversations([rollout for unit in other.rollouts(sorted(other.ledger.committed())) for rollout in unit])
        for reason, number in taken.left_out.items():
            log.warning("%s: %d rows are not taken over: %s", path, number, reason)
        conversations: Mapping[str, tuple[ImportedConversation, ...]] = taken.conversations
        defaults = tuple(name for name in sorted(conversations) if name in other.default_archetypes)
    else:
        conversations = read_conversations(path)
        defaults = tuple(name for name in sorted(conversations) if name == DEFAULT_ARCHETYPE)
    rows = rows_to_import(conversations)
    return _Wanted(
        rows=rows,
        archetypes=tuple(sorted(conversations)),
        defaults=defaults,
        row_of={row.key: row for row in rows}.get,
        selection=None,
        source={"source": "import"},
    )


def _from_catalog(job: Job) -> _Wanted:
    selection = select(load_catalog(job.catalog.source), job.catalog)
    rows = rows_to_generate(
        selection.archetypes,
        num_prompts=selection.system_prompts,
        questions={index: selection.catalog.questions[index].text for index in selection.questions},
        samples=selection.samples,
        seed=job.rollouts.seed,
    )
    return _Wanted(
        rows=rows,
        archetypes=tuple(archetype.name for archetype in selection.archetypes),
        defaults=tuple(archetype.name for archetype in selection.archetypes if archetype.is_default),
        row_of=partial(_row_of, {archetype.name: archetype for archetype in selection.catalog.archetypes}, selection.catalog.questions),
        selection=selection,
        source=job.rollouts.model_dump(mode="json", exclude={"path"}),
    )


def _row_of(archetypes: Mapping[str, Archetype], questions: Sequence[Question], key: RowKey) -> Row | None:
    """Of the catalogue, the whole of it."""
    archetype = archetypes.get(key.archetype)
    if archetype is None or key.system_prompt >= len(archetype.system_prompts) or key.question >= len(questions):
        return None
    return generated_row(archetype, key.system_prompt, key.question, questions[key.question].text, key.sample)


def _unit_rows(job: Job, num_rows: int, values_per_row: int) -> int:
    """What fills a shard, and in a small run few enough for every replica to have several units."""
    fills_a_shard = int(SHARD_BYTES / (values_per_row * 4 * STORED_SHARE))
    replicas = 1 if job.shards.replicas == "auto" else job.shards.replicas
    return max(1, min(fills_a_shard, MAX_UNIT_ROWS, num_rows // (4 * replicas)))


def _whole_model(job: Job, location: str, facts: ModelFacts, layers: tuple[int, ...]) -> StageSpec:
    return StageSpec(
        location=location,
        revision=facts.revision,
        dtype=job.model.dtype,
        attention=facts.attention,
        first_layer=0,
        end_layer=facts.num_layers,
        num_layers=facts.num_layers,
        captured=layers,
        device=job.shards.device,
        generates=job.rollouts.source == "generate",
        tensor_parallel=job.shards.tensor_parallel,
    )


def sampling_of(job: Job) -> Sampling:
    """How the job draws tokens."""
    r = job.rollouts
    return Sampling(max_new_tokens=r.max_new_tokens, temperature=r.temperature, top_p=r.top_p, top_k=r.top_k, seed=r.seed)


def lexicon_of(model_id: str) -> Path | None:
    """The lexicon that comes with a model, if one does."""
    lexicon = Path(model_location(model_id)) / "lexicon.json"
    return lexicon if lexicon.is_file() else None


CHARACTERS_PER_TOKEN = 4.0
"""About, in the languages of the catalogue; good enough to compare units."""


def expected_tokens(row: Row) -> float:
    """What a row will cost, about: the characters of its conversation."""
    return 1 + sum(len(message.content) for message in row.conversation) / CHARACTERS_PER_TOKEN
