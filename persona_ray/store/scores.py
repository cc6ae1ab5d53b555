"""Scores of a judge: `scores/{name}/score` in Zarr, its raw answers as Parquet beside it, both write-once per unit.

The raw answers are created first and the numbers follow from what is really stored there, so that a judge who answers
differently the second time cannot leave a score without its reason. `scores/latest.json` names the judge in force.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from persona_ray.errors import InputError, IntegrityError, StateError
from persona_ray.spec import NOT_SCORED, Judgement, Rollout
from persona_ray.store.address import absolute_url, open_backend
from persona_ray.store.backend import METADATA_NAME, Backend
from persona_ray.store.encoding import array_document, encode_unit, group_document
from persona_ray.store.layout import chunk_key, score_array
from persona_ray.store.metadata import settle
from persona_ray.store.plans import Plans, read_plans
from persona_ray.store.text import decode_table, encode_table

LATEST_SCORES_KEY = "scores/latest.json"
MAX_SCORE = 3
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RAW_COLUMNS = {"rollout": pa.int64(), "score": pa.int8(), "raw": pa.string()}
_RAW_SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for name, kind in _RAW_COLUMNS.items()])


class ScoreWriter:
    """One judge's scores into the store at `url`. Pickles as its arguments and opens in the process that uses it."""

    def __init__(self, url: str, judge_name: str, settings: Mapping[str, Any]) -> None:
        """`judge_name` differs for different `settings` (plain JSON values). Raises InputError for an unusable name or URL."""
        self.url = absolute_url(url)
        self.judge_name = checked_name(judge_name)
        self.settings = dict(settings)
        self._known: Plans | None = None

    def __reduce__(self) -> tuple[type[ScoreWriter], tuple[str, str, dict[str, Any]]]:
        """Travels as its arguments; connections do not travel."""
        return ScoreWriter, (self.url, self.judge_name, self.settings)

    def write(self, unit: int, rollouts: Sequence[Rollout], judgements: Sequence[Judgement]) -> None:
        """Judgements of the unit's rows, in order. Raises IntegrityError if they are not the unit's, or a score is not -1..3."""
        plans = self._plans(unit)
        backend, spec = self._backend, score_array(plans, self.judge_name)
        rows = plans.rows(unit)
        _check_judgements(unit, rows, rollouts, judgements)
        key = raw_key(self.judge_name, unit)
        data = _encode_raw(rollouts, judgements)
        if not backend.create_once(key, data).is_ours:
            data = backend.get(key)
        scores_R = np.full(plans.unit_rows, NOT_SCORED, dtype=np.int8)
        scores_R[: len(rows)] = decode_table(data, f"{self.url}: {key}").column("score").to_numpy()
        backend.create_once(chunk_key(spec, unit), encode_unit(spec, scores_R))

    def _plans(self, unit: int) -> Plans:
        """Plans that have the unit: another run may have added one since."""
        if self._known is None or unit not in self._known:
            self._known = read_plans(self._backend)
        if unit not in self._known:
            raise IntegrityError(f"{self.url}: unit {unit:06d} is in no plan")
        return self._known

    @cached_property
    def _backend(self) -> Backend:
        backend = open_backend(self.url)
        spec = score_array(read_plans(backend), self.judge_name)
        if backend.get_or_none(f"{spec.name}/{METADATA_NAME}") is None:
            backend.replace(f"scores/{METADATA_NAME}", group_document({}))
            settings = group_document({"judge": self.judge_name, "settings": self.settings})
            backend.replace(f"scores/{self.judge_name}/{METADATA_NAME}", settings)
            backend.create_all({f"{spec.name}/{METADATA_NAME}": array_document(spec)})
        return backend


def publish_scores(url: str, name: str) -> None:
    """Make judge `name` the one in force. Raises StateError if it has written nothing."""
    backend = open_backend(url)
    if backend.get_or_none(f"scores/{checked_name(name)}/{METADATA_NAME}") is None:
        raise StateError(f"{backend.url}: there are no scores by {name} to publish")
    backend.replace(LATEST_SCORES_KEY, json.dumps({"name": name}).encode())
    settle(backend)


def raw_key(name: str, unit: int) -> str:
    """Key of the judge's raw answers for a unit."""
    return f"scores/{name}/raw/part-{unit:06d}.parquet"


def checked_name(name: str) -> str:
    """`name`, if it can be a folder of the store. Raises InputError."""
    if _NAME.fullmatch(name) is None:
        raise InputError(f"{name!r} cannot name a part of a store: letters, digits, dot, dash and underscore only")
    return name


def _check_judgements(unit: int, rows: range, rollouts: Sequence[Rollout], judgements: Sequence[Judgement]) -> None:
    if [rollout.index for rollout in rollouts] != list(rows) or len(judgements) != len(rollouts):
        raise IntegrityError(
            f"unit {unit:06d}: {len(judgements)} judgements of {len(rollouts)} rollouts are not "
            f"one for each of rows {rows.start} to {rows.stop - 1}"
        )
    wrong = next((judgement.score for judgement in judgements if not NOT_SCORED <= judgement.score <= MAX_SCORE), None)
    if wrong is not None:
        raise IntegrityError(f"unit {unit:06d}: a score is {wrong}; it must be 0 to {MAX_SCORE}, or {NOT_SCORED} for none")


def _encode_raw(rollouts: Sequence[Rollout], judgements: Sequence[Judgement]) -> bytes:
    columns: dict[str, npt.NDArray[Any] | list[str]] = {
        "rollout": np.array([rollout.index for rollout in rollouts], dtype=np.int64),
        "score": np.array([judgement.score for judgement in judgements], dtype=np.int8),
        "raw": [judgement.raw for judgement in judgements],
    }
    return encode_table(pa.table(columns, schema=_RAW_SCHEMA))
