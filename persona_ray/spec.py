"""The nouns of persona_ray, and the protocols by which its parts meet.

Values only: no I/O, no Ray, no torch, no zarr. The sibling packages do not import each other; what one hands to another
is defined here. Words as in the README's glossary.

Shape legend, used in names throughout: R = rows (rollouts) of a unit, B = rollouts in a batch, T = padded tokens,
L = captured layers, D = model width (`hidden`), A = archetypes, K = principal components, V = vocabulary.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]

NO_ARCHETYPE = -1
"""Archetype code of the padding rows that fill a plan's last unit."""

NOT_SCORED = -1


def digest_of(value: object) -> str:
    """SHA-256 (hex) of `value` as canonical JSON: sorted keys, no white space. Floats keep their shortest repr."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


# ---- what is asked --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Archetype:
    """A character the model is asked to play. The default Assistant is one, and only `is_default` tells."""

    name: str
    description: str
    system_prompts: tuple[str, ...]
    """Ways of asking for the archetype; an empty one means: no system message at all."""
    is_default: bool = False


@dataclass(frozen=True, slots=True)
class Question:
    """An extraction question, shared by all archetypes."""

    text: str
    topic: str = ""
    """The word of the question that names what it is about."""
    theme: str = ""


@dataclass(frozen=True, slots=True)
class Catalog:
    """Archetypes and questions. Questions are addressed by position."""

    archetypes: tuple[Archetype, ...]
    questions: tuple[Question, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over every text; any edit changes it."""
        return digest_of(asdict(self))


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, order=True)
class RowKey:
    """What a row is, in any store: two stores of the same job are equal as sets of rows under this key."""

    archetype: str
    system_prompt: int
    question: int
    sample: int = 0
    turn: int = 0
    """Index of the answer among the conversation's messages, the system message counted where there is one."""


@dataclass(frozen=True, slots=True)
class Row:
    """One wanted rollout at its place in the store."""

    index: int
    key: RowKey
    system_prompt: str
    question: str
    conversation: tuple[Message, ...]
    """Generation: the turns up to the question. Import: up to and including the assistant turn that is measured."""

    @property
    def text_digest(self) -> str:
        """12 hex digits of the conversation: one row key stands for one text in a store."""
        text = "\x1e".join(f"{message.role}\x1f{message.content}" for message in self.conversation)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


@dataclass(frozen=True, slots=True)
class Unit:
    """The rows that are leased, computed, written and committed together. Padding rows are not among `rows`."""

    index: int
    rows: tuple[Row, ...]
    excluded: Mapping[int, str] = field(default_factory=dict)
    """`Row.index` -> why the row is refused without being tried."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A list of wanted rows. Unit `first_unit + i` holds rows `[i * unit_rows, (i + 1) * unit_rows)` of `keys`."""

    archetypes: tuple[str, ...]
    """Names; the position is the code."""
    default_archetypes: tuple[str, ...]
    """Those that are the default Assistant."""
    keys: tuple[RowKey, ...]
    unit_rows: int
    first_unit: int = 0
    text_digests: tuple[str, ...] = ()
    """`Row.text_digest` of each row; empty = not known."""

    @property
    def num_units(self) -> int:
        """Units of this plan, the padded last one included."""
        return -(-len(self.keys) // self.unit_rows)

    @property
    def units(self) -> range:
        """Indices of this plan's units in the store."""
        return range(self.first_unit, self.first_unit + self.num_units)


# ---- what was made --------------------------------------------------------------------------------------------------


class FinishReason(enum.IntEnum):
    """Why an answer ended. Codes as stored."""

    STOP = 0
    LENGTH = 1
    IMPORTED = 2
    REFUSED = 3


class Status(enum.IntEnum):
    """What became of a row. Codes as stored; -1 = not committed."""

    STORED = 0
    REFUSED = 1


@dataclass(frozen=True, slots=True)
class Rollout:
    """One conversation with its token ids: a line of a unit's Parquet part.

    `token_ids` (int32) is the conversation up to this answer's end; `[response_start, response_end)` is the range that is
    pooled. A row that cannot be used says why in `refusal`.
    """

    index: int
    key: RowKey
    system_prompt: str
    question: str
    response: str
    token_ids: Int32
    response_start: int
    response_end: int
    finish_reason: FinishReason
    refusal: str | None = None
    thinking: str = ""
    """The reasoning in front of `response`, which is not in it; "" = none. `token_ids` keep what was generated, all of it."""


@dataclass(frozen=True, slots=True)
class CapturedUnit:
    """Activations of one unit, ready to be committed.

    `activations_RLD` is float32, NaN in refused rows; its first dim follows `rollouts`. `made` says how: kernel, hardware, seconds,
    tokens, notes.
    """

    index: int
    rollouts: tuple[Rollout, ...]
    activations_RLD: Float32
    refused: Mapping[int, str]
    """Row index in the store -> reason."""
    made: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a replica hands back for a unit: small, because the data went to the store."""

    unit: int
    num_stored: int
    num_refused: int
    num_tokens: int
    seconds: float
    is_ours: bool = True
    """False: somebody else had committed the unit by then, and his rows are those that count."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """A judge's verdict on one rollout: 0 (not in the role at all) to 3 (fully), -1 if it gave none."""

    score: int
    raw: str
    """The judge's answer as it came, for the record."""


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """One unit for a reducer. Only committed, stored rows; the first dim of all four is the same."""

    rollout_R: npt.NDArray[np.int64]
    archetype_R: Int32
    """Archetype codes."""
    score_R: npt.NDArray[np.int8]
    """0..3, or -1 where no judge has spoken."""
    activations_RLD: Float32


# ---- what makes rows the same experiment ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Everything that must match for two runs to fill one store. See design: Digests."""

    model_id: str
    model_revision: str | None
    model_config_digest: str
    tokenizer_digest: str
    template_digest: str
    dtype: str
    attention: str
    span_rule: str
    layers: tuple[int, ...]
    hidden_size: int
    rollouts: Mapping[str, Any]
    """Generation settings with the seed, or that the conversations are imported. Texts are bound row by row: `Row.text_digest`."""
    max_length: int
    unit_rows: int
    store_dtype: str

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @property
    def digest(self) -> str:
        """SHA-256 of the whole identity."""
        return digest_of(self.as_dict())


# ---- generation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is drawn. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch those filters off."""

    max_new_tokens: int
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A prompt to be continued. `stream` names its random numbers: equal (seed, stream, step), equal draw."""

    stream: str
    prompt_ids: Int32


@dataclass(frozen=True, slots=True)
class Generated:
    """The answer's token ids (int32), without the stop token that ended it."""

    answer_ids: Int32
    finish_reason: FinishReason


class Edit(Protocol):
    """A change of the residual stream after decoder block `layer`, at every token position."""

    @property
    def layer(self) -> int:
        """Decoder block whose output is changed."""
        ...

    def __call__(self, hidden_BTD: Any) -> Any:
        """The changed hidden states: same shape, dtype and device (a torch tensor in, a torch tensor out)."""
        ...


@dataclass(frozen=True, slots=True)
class Spans:
    """What capture needs to know of one rollout: token ids (int32) and the half-open range to be pooled."""

    token_ids: Int32
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Captured:
    """What a forward over stored token ids gave."""

    means_RLD: Float32
    """Mean over the span of each captured decoder block's output, in the order asked for."""
    padded_tokens: int
    """Tokens that were computed, padding included."""
    notes: tuple[str, ...] = ()
    """What was not as planned: batches halved because they did not fit. Rows with a note may differ in their last bits."""
    peak_device_bytes: int | None = None
    """Most device memory that one shard's tensors have taken so far; None on CPUs."""


class Engine(Protocol):
    """One replica of the model, however many shards it has."""

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling, edits: Sequence[Edit] = ()) -> list[Generated]:
        """One answer for every request, in order."""
        ...

    def capture(self, rollouts: Sequence[Spans]) -> Captured:
        """Means over the spans of all rollouts, in order."""
        ...

    @property
    def made(self) -> Mapping[str, Any]:
        """Hardware and kernel, for the record."""
        ...


# ---- what is concluded -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduced:
    """Persona space of one store: a group `reduced/{name}`. All arrays float32 unless said.

    The archetype dim follows the plan's archetype codes; archetypes that the filter leaves with fewer than `min_count`
    rows, and the default Assistant, have NaN in `role_vector_ALD`.
    """

    name: str
    """Different for different data (ledger digest), scores or settings."""
    archetypes: tuple[str, ...]
    layers: tuple[int, ...]
    role_vector_ALD: Float32
    role_count_A: Int32
    """Rows that passed the filter (default Assistant: all its rows)."""
    default_vector_LD: Float32
    axis_LD: Float32
    """default_vector - unweighted mean of role vectors: points to the Assistant."""
    pca_components_LKD: Float32
    """Unit vectors, rows by falling variance; PC1 points to the default Assistant."""
    pca_explained_variance_LK: Float32
    pca_explained_variance_ratio_LK: Float32
    cos_pc1_axis_L: Float32
    attributes: Mapping[str, Any]
    """ledger_digest, filter, judge, preset, best_layer with its reason, projections ...; plain JSON values."""
    somewhat_vector_ALD: Float32 | None = None
    """Mean of rows of score 2 exactly, NaN where there are fewer than `min_count`; None: not asked for."""
    pca_mean_LD: Float32 | None = None
    pca_scale_LD: Float32 | None = None
    """Coordinates of x are ((x - pca_mean) * pca_scale) @ components; None in results older than both: mean of the roles, and 1."""
    rollout_pca_components_LKD: Float32 | None = None
    """Unit vectors over all stored rows, signs as of the others; None: not asked for, as the four below."""
    rollout_pca_explained_variance_LK: Float32 | None = None
    rollout_pca_explained_variance_ratio_LK: Float32 | None = None
    rollout_pca_mean_LD: Float32 | None = None
    cos_rollout_pc1_axis_L: Float32 | None = None

    @property
    def unit_axis_LD(self) -> Float32:
        """The axis of each layer over its norm, for projecting and steering; 0 where the axis is 0."""
        norm_L1 = np.linalg.norm(self.axis_LD.astype(np.float64), axis=-1, keepdims=True)
        unit_LD: Float32 = np.divide(self.axis_LD, norm_L1, out=np.zeros_like(self.axis_LD), where=norm_L1 > 0, casting="same_kind")
        return unit_LD


@dataclass(frozen=True, slots=True)
class CertainPosition:
    """One archetype's place along the axis, in units of the residual stream."""

    position: float
    low: float
    high: float
    """The interval holds the true position with the confidence asked for."""
    rank_low: int | None = None
    rank_high: int | None = None
    """Its rank among the roles, 1 is the most Assistant-like; None for the default Assistant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Certainty:
    """How the axis at one layer would move with other questions of the same kind (bootstrap by question)."""

    layer: int
    confidence: float
    """0..1."""
    num_replicates: int
    num_questions: int
    cone_degrees: float
    """The true axis lies within this angle of ours, with that confidence."""
    split_half_cosine: float | None
    """Between the axes of two halves of the questions; None if a half has too few rows for one."""
    rows_per_archetype: tuple[int, ...]
    cosine_with_all_rows: tuple[float | None, ...]
    """Between the axis of so many first rows of every archetype and that of all rows; None where so few rows give none."""
    rows_needed: int | None
    """The least of `rows_per_archetype` from which on the axis stayed the same; None: only all rows give it."""
    default: CertainPosition
    roles: Mapping[str, CertainPosition]


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeringExample:
    """One question to one archetype, answered under each edit."""

    archetype: str
    question: str
    answers: Mapping[str, str]
    """Arm's label -> answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeringArm:
    """What one edit did to one cohort."""

    label: str
    """"none", "+axis", "-axis", "+random" or "-random"."""
    cohort: str
    """"far": archetypes at the role-playing end of the axis; "near": the default Assistant and its neighbours."""
    strength: float
    """Signed multiple of the axis; a random direction has the axis's norm."""
    assistant_share: float
    """Of all lexicon words in the answers, the share that belongs to the Assistant's side; 0..1."""
    num_answers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeringCheck:
    """Does adding the axis move what the model says? Layer and strength were chosen on other questions than measured."""

    layer: int
    strength: float
    cohorts: Mapping[str, tuple[str, ...]]
    """Cohort -> archetype names."""
    questions_chosen_on: tuple[int, ...]
    questions_measured_on: tuple[int, ...]
    candidates: tuple[Mapping[str, float], ...]
    """What the choice was made from: layer, strength, shift_toward, shift_away."""
    arms: tuple[SteeringArm, ...]
    examples: tuple[SteeringExample, ...]


# ---- protocols between siblings -------------------------------------------------------------------------------------


class Judge(Protocol):
    """Says how far a rollout is in its role."""

    @property
    def name(self) -> str:
        """Short name that is different for different settings: backend and digest."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the name stands for; plain JSON values."""
        ...

    def judge(self, rollouts: Sequence[Rollout]) -> list[Judgement]:
        """One judgement for every rollout, in order."""
        ...


class UnitSink(Protocol):
    """Where a replica leaves its work. Everything is created once: the first writer wins."""

    def read_rollouts(self, unit: int) -> tuple[Rollout, ...] | None:
        """The unit's text, if somebody has written it already."""
        ...

    def write_rollouts(self, unit: int, rollouts: Sequence[Rollout]) -> tuple[Rollout, ...]:
        """Create the unit's text; answers what is really there, which may be another writer's."""
        ...

    def commit(self, captured: CapturedUnit) -> bool:
        """Write the numbers, then the marker: after this the unit exists for good. False: it did before."""
        ...


class RowSource(Protocol):
    """What a reducer reads: units of scored rows, one after the other."""

    def __call__(self, units: Sequence[int]) -> Iterator[ScoredRows]:
        """The units' committed rows, in the order asked for."""
        ...


ProgressCallback = Callable[[int], None]
"""Called with the number of items done since the last call."""


class Progress(Protocol):
    """Who tells people how far the run is."""

    def phase(self, name: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[ProgressCallback]:
        """One piece of long work, of `total` items called `unit`, `done` of them before."""
        ...


@dataclass(slots=True)
class RunCounts:
    """asked = stored + refused, once a run has ended."""

    asked: int
    stored: int = 0
    refused: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    """Refusal reason -> number of rows."""
