"""Reads a store, also while it grows. Only committed rows are ever handed out; the ledger alone says which those are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from persona_ray.errors import InputError, IntegrityError
from persona_ray.spec import NOT_SCORED, Float32, Plan, Reduced, Rollout, ScoredRows
from persona_ray.store.address import absolute_url, open_backend
from persona_ray.store.backend import METADATA_NAME
from persona_ray.store.encoding import decode_unit
from persona_ray.store.layout import ArraySpec, parquet_key, planned_columns, unit_arrays, unit_chunk_key, unit_slice
from persona_ray.store.ledger import Ledger
from persona_ray.store.marker import Marker
from persona_ray.store.plan_file import PlanFile, read_plan_file
from persona_ray.store.reduced import LATEST_REDUCED_KEY, read_reduced
from persona_ray.store.scores import LATEST_SCORES_KEY, score_array
from persona_ray.store.text import decode_rollouts

READ_CONCURRENCY = 32
"""A layer is one small read per unit: at zarr's default of 10 most of the time is waiting."""


def open_store(url: str) -> StoreReader:
    """The store at `url`, read-only. Raises InputError if there is none."""
    return StoreReader(url)


class StoreReader:
    """A store that is there. Pickles as its URL."""

    def __init__(self, url: str) -> None:
        """Reads the plan file, nothing else. Raises InputError if there is no store."""
        self.url = absolute_url(url)
        self._backend = open_backend(self.url)
        self._header: PlanFile = read_plan_file(self._backend)
        self._arrays = unit_arrays(self._header)
        self._archetype_N = planned_columns(self._header.plan)["archetype"].astype(np.int32)
        self.ledger = Ledger(self.url)
        """Which units exist."""

    def __reduce__(self) -> tuple[type[StoreReader], tuple[str]]:
        """Travels as its URL; connections do not travel."""
        return StoreReader, (self.url,)

    @property
    def identity(self) -> dict[str, Any]:
        """`Identity.as_dict()` of the store."""
        return self._header.identity

    @property
    def job(self) -> dict[str, Any]:
        """The job that began the store, as plain JSON values."""
        return self._header.job

    @property
    def plan(self) -> Plan:
        """What was asked for."""
        return self._header.plan

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the root group."""
        return dict(json.loads(self._backend.get(METADATA_NAME))["attributes"])

    def rollouts(self, units: Sequence[int]) -> Iterator[tuple[Rollout, ...]]:
        """The units' text, refused rows included. Raises IntegrityError for a unit without text."""
        for unit in units:
            key = parquet_key(unit)
            yield decode_rollouts(self._backend.get(key), f"{self.url}: {key}")

    def scored_rows(self, units: Sequence[int], scores: str | None) -> Iterator[ScoredRows]:
        """The units' committed, stored rows with the scores of judge `scores` (None: -1 everywhere).

        A unit that is not committed gives nothing. Each unit is one read of all layers. Raises IntegrityError for damage.
        """
        for unit in units:
            marker = self.ledger.marker(unit)
            if marker is not None:
                yield self._scored_unit(unit, marker, scores)

    def layer(self, layer: int) -> tuple[npt.NDArray[np.int64], Float32]:
        """All committed, stored rows of decoder block `layer`: row indices (N,), activations (N, D) float32.

        Raises InputError if the layer was not captured.
        """
        if layer not in self._header.layers:
            raise InputError(f"{self.url}: layer {layer} was not captured; there are {list(self._header.layers)}")
        rows_N = self._stored_rows()
        array = zarr.open_array(self._backend.zarr_store(), path="activations", mode="r")
        with zarr.config.set({"async.concurrency": READ_CONCURRENCY}):
            values_RD = np.asarray(array[:, self._header.layers.index(layer), :])
        values_ND = values_RD[rows_N]
        self._check_finite(values_ND, rows_N)
        return rows_N, values_ND

    def latest_scores(self) -> str | None:
        """Name of the judge in force."""
        return self._latest(LATEST_SCORES_KEY)

    def latest_reduced(self) -> str | None:
        """Name of the result in force."""
        return self._latest(LATEST_REDUCED_KEY)

    def scored_units(self, name: str) -> frozenset[int]:
        """Units that judge `name` has scored; one listing."""
        chunk = re.compile(rf"{re.escape(score_array(self.plan, name).name)}/c/(\d+)")
        matches = (chunk.fullmatch(key) for key in self._backend.list_keys(f"scores/{name}/score"))
        return frozenset(int(match.group(1)) for match in matches if match)

    def reduced(self, name: str) -> Reduced:
        """The result `name`. Raises InputError if there is none."""
        return read_reduced(self._backend, name)

    def info(self) -> dict[str, Any]:
        """What the store holds right now, as plain JSON values. Sizes in bytes."""
        markers = self.ledger.markers()
        counts = self.ledger.counts()
        latest_scores = self.latest_scores()
        return {
            "url": self.url,
            "name": self.job.get("name"),
            "model": {name: self.identity[f"model_{name}"] for name in ("id", "revision")},
            "dtype": {"model": self.identity["dtype"], "store": self.identity["store_dtype"]},
            "layers": list(self._header.layers),
            "hidden_size": self._header.hidden_size,
            "archetypes": list(self.plan.archetypes),
            "default_archetypes": list(self.plan.default_archetypes),
            "units": {"planned": self.plan.num_units, "committed": len(markers), "rows": self.plan.unit_rows},
            "rows": {"asked": counts.asked, "stored": counts.stored, "refused": counts.refused, "reasons": counts.reasons},
            "scores": {"latest": latest_scores, "units": len(self.scored_units(latest_scores)) if latest_scores else 0},
            "reduced": {"latest": self.latest_reduced()},
            "bytes": sum(marker.num_bytes for marker in markers.values()),
            "created": self._header.created,
            "last_commit": max((marker.created for marker in markers.values()), default=None),
            "identity_digest": self._header.identity_digest,
            "plan_digest": self._header.plan_digest,
            "ledger_digest": self.ledger.digest(),
            "schema_version": self._header.schema_version,
            "versions": self._header.versions,
        }

    def _scored_unit(self, unit: int, marker: Marker, scores: str | None) -> ScoredRows:
        rows = unit_slice(self.plan, unit)
        rows_R = np.array([row for row in range(rows.start, rows.stop) if row not in marker.refused], dtype=np.int64)
        places_R = rows_R - rows.start
        activations_RLD = self._unit_values(self._arrays["activations"], unit)[places_R]
        self._check_finite(activations_RLD, rows_R)
        return ScoredRows(
            rollout_R=rows_R,
            archetype_R=self._archetype_N[rows_R],
            score_R=self._scores(unit, scores)[places_R],
            activations_RLD=activations_RLD,
        )

    def _scores(self, unit: int, name: str | None) -> npt.NDArray[np.int8]:
        """Of the whole unit; -1 where the judge has not spoken."""
        spec = None if name is None else score_array(self.plan, name)
        if spec is None or self._backend.get_or_none(unit_chunk_key(spec, unit)) is None:
            return np.full(self.plan.unit_rows, NOT_SCORED, dtype=np.int8)
        return self._unit_values(spec, unit)

    def _unit_values(self, spec: ArraySpec, unit: int) -> npt.NDArray[Any]:
        key = unit_chunk_key(spec, unit)
        return decode_unit(spec, self._backend.get(key), f"{self.url}: {key}")

    def _stored_rows(self) -> npt.NDArray[np.int64]:
        rows: list[int] = []
        for unit, marker in self.ledger.markers().items():
            of_unit = unit_slice(self.plan, unit)
            rows += [row for row in range(of_unit.start, of_unit.stop) if row not in marker.refused]
        return np.array(rows, dtype=np.int64)

    def _check_finite(self, values: Float32, rows_N: npt.NDArray[np.int64]) -> None:
        """A missing object reads as NaN; a committed row never is."""
        is_broken_N = ~np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
        if is_broken_N.any():
            first = int(rows_N[np.argmax(is_broken_N)])
            raise IntegrityError(
                f"{self.url}: {int(is_broken_N.sum())} committed rows hold NaN or Inf (first: row {first}, "
                f"unit {first // self.plan.unit_rows:06d}); was an object deleted?"
            )

    def _latest(self, key: str) -> str | None:
        data = self._backend.get_or_none(key)
        return None if data is None else str(json.loads(data)["name"])


@dataclass(frozen=True, slots=True)
class StoredRows:
    """A `spec.RowSource` that travels: it opens the store in the process that reads."""

    url: str
    scores: str | None
    """Name of the judge whose scores come along."""

    def __call__(self, units: Sequence[int]) -> Iterator[ScoredRows]:
        """The units' committed, stored rows, in the order asked for."""
        return open_store(self.url).scored_rows(units, self.scores)
