"""One run as a process of its own: `python -m tests.s3.appender URL QUESTIONS ARCHETYPE...` claims what is missing and writes it all."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass

import numpy as np

from persona_ray.spec import CapturedUnit, FinishReason, Float32, Plan, Rollout, RowKey
from persona_ray.store.finish import finish_store
from persona_ray.store.ledger import Ledger
from persona_ray.store.plans import Plans
from persona_ray.store.prepare import prepare_store
from persona_ray.store.writer import UnitWriter
from tests.store.conftest import Toy

TOY = Toy(layers=(0, 3), hidden=6)


@dataclass(frozen=True)
class Asked:
    """Archetypes x questions. What a row holds depends on its key alone."""

    archetypes: tuple[str, ...]
    questions: int

    @property
    def plan(self) -> Plan:
        keys = tuple(RowKey(name, 0, question, turn=1) for question in range(self.questions) for name in self.archetypes)
        return Plan(self.archetypes, (), keys, TOY.unit_rows, text_digests=tuple(f"{key.archetype}/{key.question}" for key in keys))

    def prepare(self, url: str) -> Plans:
        return prepare_store(url, identity=TOY.identity(), plan=self.plan, job={"name": "+".join(self.archetypes)})

    def run(self, url: str, seed: int) -> None:
        """Claim, write every unit with a row of this job that is not there, in an order of its own."""
        plans = self.prepare(url)
        wanted, committed = set(self.plan.keys), Ledger(url).committed()
        units = [unit for unit in plans.units if unit not in committed and not wanted.isdisjoint(plans.keys(unit))]
        random.Random(seed).shuffle(units)
        writer = UnitWriter(url)
        for unit in units:
            write_unit(writer, plans, unit)
        finish_store(url)


def values_of(key: RowKey) -> Float32:
    """(L, D), exact in bfloat16."""
    return np.random.default_rng([*key.archetype.encode(), key.question]).integers(-99, 99, size=(2, 6)).astype(np.float32)


def write_unit(writer: UnitWriter, plans: Plans, unit: int) -> None:
    rollouts = tuple(
        Rollout(row, key, "", f"Question {key.question}?", "Aye.", np.arange(9, dtype=np.int32), 2, 4, FinishReason.STOP)
        for row, key in zip(plans.rows(unit), plans.keys(unit), strict=True)
    )
    texts = writer.read_rollouts(unit) or writer.write_rollouts(unit, rollouts)
    writer.commit(CapturedUnit(unit, texts, np.stack([values_of(text.key) for text in texts]), {}, {"hardware": "cpu"}))


if __name__ == "__main__":
    url, questions, *archetypes = sys.argv[1:]
    Asked(tuple(archetypes), int(questions)).run(url, seed=len(archetypes[0]))
