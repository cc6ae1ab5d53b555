"""A toy job of any size: identity, plan, text and numbers that any test can write and recompute."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from persona_ray.spec import CapturedUnit, FinishReason, Float32, Identity, Plan, Rollout, RowKey
from persona_ray.store.prepare import prepare_store
from persona_ray.store.writer import UnitWriter


@dataclass(frozen=True, kw_only=True)
class Toy:
    """Rows of three archetypes; values depend on seed and row alone."""

    rows: int = 10
    unit_rows: int = 4
    layers: tuple[int, ...] = (0, 3)
    hidden: int = 6
    store_dtype: str = "bf16-exact"
    archetypes: tuple[str, ...] = ("default", "bard", "sage")

    @property
    def plan(self) -> Plan:
        num = len(self.archetypes)
        keys = tuple(RowKey(self.archetypes[i % num], i % 2, i // num, sample=i % 3, turn=1) for i in range(self.rows))
        return Plan(archetypes=self.archetypes, default_archetypes=self.archetypes[:1], keys=keys, unit_rows=self.unit_rows)

    def identity(self, **changes: Any) -> Identity:
        fields: dict[str, Any] = {
            "model_id": "toy/model",
            "model_revision": None,
            "model_config_digest": "c0",
            "tokenizer_digest": "t0",
            "template_digest": "m0",
            "dtype": "bfloat16",
            "attention": "eager",
            "span_rule": "answer-tokens-1",
            "layers": self.layers,
            "hidden_size": self.hidden,
            "rollouts": {"source": "generate", "seed": 0, "temperature": 0.7},
            "max_length": 64,
            "unit_rows": self.unit_rows,
            "store_dtype": self.store_dtype,
        }
        return Identity(**(fields | changes))

    def rollouts(self, unit: int, *, said: str = "Aye.", refusals: Mapping[int, str] | None = None) -> tuple[Rollout, ...]:
        rows = range(unit * self.unit_rows, min((unit + 1) * self.unit_rows, self.rows))
        return tuple(self._rollout(row, said, (refusals or {}).get(row)) for row in rows)

    def _rollout(self, row: int, said: str, refusal: str | None) -> Rollout:
        return Rollout(
            index=row,
            key=self.plan.keys[row],
            system_prompt="You are a bard.\n",
            question="Who are you? " + "\N{SNOWMAN}",
            response=said,
            token_ids=np.arange(row, row + 9 + len(said), dtype=np.int32),
            response_start=5,
            response_end=6 + row % 3,
            finish_reason=FinishReason.LENGTH if row % 2 else FinishReason.STOP,
            refusal=refusal,
        )

    def activations(self, unit: int, seed: int = 0) -> Float32:
        num_rows = len(self.rollouts(unit))
        return np.random.default_rng([seed, unit]).normal(size=(num_rows, len(self.layers), self.hidden)).astype(np.float32)

    def captured(
        self,
        unit: int,
        *,
        seed: int = 0,
        refused: Mapping[int, str] | None = None,
        rollouts: tuple[Rollout, ...] | None = None,
        activations: Float32 | None = None,
    ) -> CapturedUnit:
        values = self.activations(unit, seed) if activations is None else activations
        texts = self.rollouts(unit) if rollouts is None else rollouts
        values = values.copy()
        for row in refused or {}:
            values[row - unit * self.unit_rows] = np.nan
        return CapturedUnit(
            index=unit, rollouts=texts, activations_RLD=values, refused=dict(refused or {}), made={"kernel": "eager", "seed": seed}
        )

    def prepare(self, url: str | Path) -> str:
        prepare_store(str(url), identity=self.identity(), plan=self.plan, job={"name": "toy"})
        return str(url)

    def fill(self, url: str | Path, units: range | None = None, refused: Mapping[int, str] | None = None) -> str:
        """Prepare the store and commit `units` (default: all)."""
        self.prepare(url)
        writer = UnitWriter(str(url))
        for unit in self.plan.units if units is None else units:
            of_unit = {row: reason for row, reason in (refused or {}).items() if row // self.unit_rows == unit}
            writer.write_rollouts(unit, self.rollouts(unit))
            writer.commit(self.captured(unit, refused=of_unit))
        return str(url)


@pytest.fixture(scope="session", autouse=True)
def _impatient_disk() -> Iterator[None]:
    """Waiting for the disk is most of the time here, and no test pulls the plug; `test_backend` checks that we would wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def make_toy() -> Callable[..., Toy]:
    """Toys of other sizes."""
    return Toy


@pytest.fixture
def toy() -> Toy:
    """Ten rows in three units, the last one half padding."""
    return Toy()


def _tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def tree() -> Callable[[Path], dict[str, bytes]]:
    """All files of a folder by relative path."""
    return _tree
