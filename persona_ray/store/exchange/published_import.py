"""What the published implementation wrote, as a store: its rows, activations and scores, without any model.

Rows stand archetype by archetype, in file order. Token ids are not in the files, so a row has none and its pooled range is
empty; `span_rule` "published" in the identity says that this is no fault. What is not known is called so.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from persona_ray.errors import InputError, NothingUsableError
from persona_ray.spec import (
    NOT_SCORED,
    CapturedUnit,
    FinishReason,
    Identity,
    Judgement,
    Plan,
    ProgressCallback,
    Rollout,
    Row,
    RowKey,
    digest_of,
)
from persona_ray.store.exchange.published_layout import (
    DEFAULT_ROLE,
    NOTE_FILE,
    Line,
    indices_of,
    read_lines,
    read_scores,
    row_key,
)
from persona_ray.store.exchange.torch_files import TensorFile, fingerprint, load_tensors, require_torch
from persona_ray.store.layout import BF16_EXACT, PUBLISHED_SPANS
from persona_ray.store.prepare import prepare_store, preview
from persona_ray.store.reader import open_store
from persona_ray.store.scores import ScoreWriter, publish_scores
from persona_ray.store.writer import UnitWriter

UNKNOWN = "unknown"
UNIT_BYTES = 64 << 20
"""Stored bytes of a unit, at two bytes a number."""
MAX_UNIT_ROWS = 256
NO_TOKENS = np.empty(0, dtype=np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What an import found."""

    url: str
    files: int
    rows: int
    """Stored: with an answer and its activation."""
    left_out: Mapping[str, int]
    """Reason -> number of refused rows."""
    judge: str | None
    """Name of the scores; None if there are no score files."""
    scores_without_row: int
    """Scores of answers that no file of responses has."""


@dataclass(frozen=True, slots=True)
class _Found:
    """A row before it has a place."""

    key: RowKey
    line: Line | None
    """None: an activation without an answer."""
    response: str
    refusal: str | None

    @property
    def name(self) -> str:
        return row_key(self.key.system_prompt, self.key.question) if self.line is None else self.line.key

    def row(self, index: int) -> Row:
        if self.line is None:
            return Row(index, self.key, "", "", ())
        return Row(index, self.key, self.line.system_prompt, self.line.question, self.line.messages[: self.key.turn + 1])

    def rollout(self, index: int) -> Rollout:
        row = self.row(index)
        reason = FinishReason.IMPORTED if self.refusal is None else FinishReason.REFUSED
        return Rollout(index, self.key, row.system_prompt, row.question, self.response, NO_TOKENS, 0, 0, reason, self.refusal)


def import_published(
    folder: str | Path,
    url: str,
    *,
    model_id: str,
    model_revision: str | None = None,
    layers: Sequence[int] | None = None,
    unit_rows: int | None = None,
    progress: ProgressCallback = lambda _: None,
) -> Imported:
    """A new store at `url` from `responses/*.jsonl`, `activations/*.pt` and, where there are any, `scores/*.json`.

    `layers`: decoder blocks of the first dim of the activations (None: what our own export noted, else counted from 0). Kept as
    bf16-exact if all activations are bfloat16, else as float32. `progress` is told of units. An interrupted import is continued by
    the same call.
    Raises InputError for files that are not of the layout, or a store that is there already; NothingUsableError if no row can be stored.
    """
    require_torch()
    source = _Source(Path(folder).expanduser())
    num_layers, hidden_size, is_bf16 = source.shape()
    layers = _layers(source.root, layers, num_layers)
    identity = _identity(source, model_id, model_revision, layers, hidden_size, unit_rows, is_bf16=is_bf16)
    plan = _plan(source, identity.unit_rows)
    scores = {archetype: read_scores(file) for archetype, file in source.scores.items()}
    _require_new(url, identity, plan)
    prepare_store(url, identity=identity, plan=plan, job={"name": source.root.absolute().name, "import": "published layout"})
    _write_rows(source, url, plan, (num_layers, hidden_size), progress)
    judge, strays = _write_scores(source, scores, url, plan) if scores else (None, 0)
    counts = open_store(url).ledger.counts()
    if not counts.stored:
        raise NothingUsableError(f"{folder}: not one of {counts.asked} rows can be stored: {', '.join(counts.reasons)}")
    return Imported(url=url, files=source.num_files, rows=counts.stored, left_out=counts.reasons, judge=judge, scores_without_row=strays)


class _Source:
    """The folder. Text and tensors are read when they are asked for, one archetype at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.responses = {file.stem: file for file in sorted((root / "responses").glob("*.jsonl"))}
        self.activations = {file.stem: file for file in sorted((root / "activations").glob("*.pt"))}
        self.scores = {file.stem: file for file in sorted((root / "scores").glob("*.json"))}
        if not self.responses or not self.activations:
            raise InputError(_not_rows(root, "responses/{role}.jsonl" if not self.responses else "activations/{role}.pt"))
        self._open: tuple[str, TensorFile] | None = None

    @property
    def archetypes(self) -> tuple[str, ...]:
        return tuple(sorted(self.responses.keys() | self.activations.keys()))

    @property
    def num_files(self) -> int:
        return len(self.responses) + len(self.activations) + len(self.scores)

    def tensors(self, archetype: str) -> TensorFile:
        """Empty if there is no file. One is kept open."""
        if self._open is None or self._open[0] != archetype:
            file = self.activations.get(archetype)
            self._open = (archetype, TensorFile(archetype, {}) if file is None else load_tensors(file))
        return self._open[1]

    def shape(self) -> tuple[int, int, bool]:
        """Layers, model width, whether everything is bfloat16. Raises InputError if the files disagree."""
        shapes: dict[tuple[int, ...], str] = {}
        is_bf16 = True
        for archetype in self.archetypes:
            file = self.tensors(archetype)
            for key in file.tensors:
                shapes.setdefault(file.shape(key), f"{key} of {file.where}")
                is_bf16 &= file.is_bfloat16(key)
        if not shapes:
            raise InputError(f"{self.root}: its files of activations are empty")
        first, *others = shapes.items()
        if others or len(first[0]) != 2 or 0 in first[0]:
            wrong = f"{first[1]} is {first[0]}" + (f" and {others[0][1]} is {others[0][0]}" if others else "")
            raise InputError(f"{wrong}; all activations must be layers x hidden, of one model")
        return first[0][0], first[0][1], is_bf16

    def rows(self) -> Iterator[_Found]:
        """All rows, archetype by archetype, the same each time: lines in file order, then activations without a line."""
        for archetype in self.archetypes:
            yield from self._of_archetype(archetype)

    def digest(self) -> str:
        """Of what the rows are made of. Texts are bound row by row by the plan."""
        return digest_of({archetype: fingerprint(file) for archetype, file in self.activations.items()})

    def _of_archetype(self, archetype: str) -> Iterator[_Found]:
        lines = list(read_lines(self.responses[archetype])) if archetype in self.responses else []
        names = {line.key for line in lines}
        known = self.tensors(archetype).tensors
        num_claims = Counter((line.prompt_index, line.question_index) for line in lines)
        seen: Counter[tuple[int, int]] = Counter()
        for line in lines:
            place = (line.prompt_index, line.question_index)
            turn = line.answers[-1] if line.answers else 0
            response = line.conversation[turn].content if line.answers else ""
            refusal = _refusal(line, response, num_claims[place], has_activation=line.key in known)
            yield _Found(RowKey(archetype, *place, seen[place], turn), line, response, refusal)
            seen[place] += 1
        for key in known:
            if key not in names:
                place = indices_of(key, f"activations of {archetype}")
                yield _Found(RowKey(archetype, *place, seen[place]), None, "", "an activation without an answer")
                seen[place] += 1


def _refusal(line: Line, response: str, num_claims: int, *, has_activation: bool) -> str | None:
    if not response.strip():
        return "empty answer"
    if len(line.answers) > 1:
        return "several answers share one activation, their mean"
    if num_claims > 1:
        return "several answers have the same indices, so whose activation it is cannot be known"
    return None if has_activation else "an answer without its activation"


def _not_rows(root: Path, missing: str) -> str:
    if not root.is_dir():
        return f"{root}: is no folder"
    alone = next((name for name in ("axis.pt", "assistant_axis.pt", "vectors", "role_vectors") if (root / name).exists()), None)
    if alone is None:
        return f"{root}: holds no {missing}; a store is made from responses/{{role}}.jsonl and activations/{{role}}.pt"
    return f"{root}: holds {alone}, and no {missing}: a result without the rows it was made from is no store; torch.load reads it as it is"


def _layers(root: Path, asked: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    layers = tuple(asked) if asked is not None else _noted_layers(root / NOTE_FILE)
    if layers is None:
        return tuple(range(num_layers))
    if len(layers) != num_layers or sorted(set(layers)) != list(layers) or layers[0] < 0:
        raise InputError(f"layers {', '.join(map(str, layers))}: the activations have {num_layers} layers, to be named in rising order")
    return layers


def _noted_layers(note: Path) -> tuple[int, ...] | None:
    if not note.is_file():
        return None
    try:
        return tuple(int(layer) for layer in json.loads(note.read_text(encoding="utf-8"))["layers"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{note}: cannot be read ({error}); name the layers, or remove it") from error


def _identity(
    source: _Source,
    model_id: str,
    model_revision: str | None,
    layers: tuple[int, ...],
    hidden_size: int,
    unit_rows: int | None,
    *,
    is_bf16: bool,
) -> Identity:
    fitting = min(MAX_UNIT_ROWS, max(1, UNIT_BYTES // (2 * len(layers) * hidden_size)))
    return Identity(
        model_id=model_id,
        model_revision=model_revision,
        model_config_digest=UNKNOWN,
        tokenizer_digest=UNKNOWN,
        template_digest=UNKNOWN,
        dtype=UNKNOWN,
        attention=UNKNOWN,
        span_rule=PUBLISHED_SPANS,
        layers=layers,
        hidden_size=hidden_size,
        rollouts={"source": "published", "activations_digest": source.digest()},
        max_length=0,
        unit_rows=unit_rows or fitting,
        store_dtype=BF16_EXACT if is_bf16 else "float32",
    )


def _plan(source: _Source, unit_rows: int) -> Plan:
    keys: list[RowKey] = []
    digests: list[str] = []
    num_usable = 0
    for found in source.rows():
        digests.append(found.row(len(keys)).text_digest)
        keys.append(found.key)
        num_usable += found.refusal is None
    if not num_usable:
        raise InputError(f"{source.root}: no answer in responses has its activation under the same role, prompt and question")
    defaults = tuple(name for name in source.archetypes if name == DEFAULT_ROLE)
    return Plan(source.archetypes, defaults, tuple(keys), unit_rows, text_digests=tuple(digests))


def _require_new(url: str, identity: Identity, plan: Plan) -> None:
    """An import fills a new store, or one that the same import began."""
    files = preview(url, identity=identity, plan=plan).files
    if len(files) != 1 or files[0].plan.keys != plan.keys:
        raise InputError(f"{url}: is a store of other rows already; import into a new place")


def _write_rows(source: _Source, url: str, plan: Plan, row_shape: tuple[int, int], progress: ProgressCallback) -> None:
    writer, committed = UnitWriter(url), open_store(url).ledger.committed()
    for unit, part in _units(source, plan):
        if unit not in committed:
            rollouts = writer.write_rollouts(unit, _rollouts(unit, part, plan))
            writer.commit(_captured(source, unit, part, rollouts, row_shape))
        progress(1)


def _units(source: _Source, plan: Plan) -> Iterator[tuple[int, list[_Found]]]:
    rows = source.rows()
    for unit in plan.units:
        yield unit, list(islice(rows, plan.unit_rows))


def _rollouts(unit: int, part: Sequence[_Found], plan: Plan) -> tuple[Rollout, ...]:
    return tuple(found.rollout(unit * plan.unit_rows + place) for place, found in enumerate(part))


def _captured(
    source: _Source, unit: int, part: Sequence[_Found], rollouts: tuple[Rollout, ...], row_shape: tuple[int, int]
) -> CapturedUnit:
    refused = {rollout.index: rollout.refusal for rollout in rollouts if rollout.refusal is not None}
    activations_RLD = np.full((len(part), *row_shape), np.nan, dtype=np.float32)
    for place, (found, rollout) in enumerate(zip(part, rollouts, strict=True)):
        if rollout.refusal is not None:
            continue
        values_LD = source.tensors(found.key.archetype).float32(found.name)
        if np.isfinite(values_LD).all():
            activations_RLD[place] = values_LD
        else:
            refused[rollout.index] = "activations are not finite"
    return CapturedUnit(unit, rollouts, activations_RLD, refused, {"kernel": UNKNOWN, "notes": ["imported from the published layout"]})


def _write_scores(source: _Source, scores: Mapping[str, Mapping[str, int]], url: str, plan: Plan) -> tuple[str, int]:
    """Name of the judge, and how many scores belong to no row."""
    # The same name as if the job's judge had read these files.
    settings = {"backend": "scores", "scores_digest": digest_of(scores)}
    judge = f"scores-{digest_of(settings)[:12]}"
    writer = ScoreWriter(url, judge, settings)
    used: set[tuple[str, str]] = set()
    for unit, part in _units(source, plan):
        writer.write(unit, _rollouts(unit, part, plan), [_judgement(scores, found) for found in part])
        used.update((found.key.archetype, found.name) for found in part)
    publish_scores(url, judge)
    return judge, sum((archetype, key) not in used for archetype, named in scores.items() for key in named)


def _judgement(scores: Mapping[str, Mapping[str, int]], found: _Found) -> Judgement:
    score = scores.get(found.key.archetype, {}).get(found.name)
    return Judgement(NOT_SCORED, f"not scored: no {found.name}") if score is None else Judgement(score, str(score))
