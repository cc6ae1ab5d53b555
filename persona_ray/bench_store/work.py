"""What is written: a made-up run with texts and activations as a model's, so far as their encoding is concerned."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np

from persona_ray.bench_store.settings import Settings
from persona_ray.errors import IntegrityError
from persona_ray.spec import CapturedUnit, FinishReason, Float32, Identity, Plan, Rollout, RowKey
from persona_ray.store.prepare import prepare_store
from persona_ray.store.writer import UnitWriter

ARCHETYPES = ("default", "bard")
TEXT_TOKENS, ANSWER_TOKENS = 80, 320
"""Tokens before an ordinary answer, and in it."""
VOCABULARY = 50_000
NUM_MASSIVE = 4
"""Dims of the residual stream that are hundreds of times as large as all others."""


class Work:
    """A made-up run: its plan, and units of any batch. Batches differ in the indices of their rows alone."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        num_rows = settings.batches * settings.units * settings.unit_rows
        keys = tuple(RowKey(ARCHETYPES[i % len(ARCHETYPES)], 0, i // len(ARCHETYPES)) for i in range(num_rows))
        self.plan = Plan(archetypes=ARCHETYPES, default_archetypes=ARCHETYPES[:1], keys=keys, unit_rows=settings.unit_rows)

    def prepare(self, url: str) -> None:
        """The empty store."""
        s = self.settings
        identity = Identity(
            model_id="benchmark/none",
            model_revision=None,
            model_config_digest="none",
            tokenizer_digest="none",
            template_digest="none",
            dtype="bfloat16",
            attention="none",
            span_rule="none",
            layers=tuple(range(s.layers)),
            hidden_size=s.hidden,
            rollouts={"source": "benchmark"},
            max_length=TEXT_TOKENS + ANSWER_TOKENS,
            unit_rows=s.unit_rows,
            store_dtype="bf16-exact",
        )
        prepare_store(url, identity=identity, plan=self.plan, job={"name": "benchmark"})

    def indices(self, batch: int) -> range:
        """Units of a batch."""
        return range(batch * self.settings.units, (batch + 1) * self.settings.units)

    def batch(self, batch: int) -> list[CapturedUnit]:
        """Units of a batch, ready to be written."""
        return [self._unit(unit, unit - self.indices(batch).start) for unit in self.indices(batch)]

    @cached_property
    def _values(self) -> list[Float32]:
        """(R, L, D) for each place in a batch."""
        s = self.settings
        return [like_a_residual_stream(np.random.default_rng([1, i]), s.unit_rows, s.layers, s.hidden) for i in range(s.units)]

    @cached_property
    def _texts(self) -> list[tuple[Rollout, ...]]:
        """Rows for each place in a batch, as if it were the first."""
        rng = np.random.default_rng(2)
        return [tuple(_rollout(rng) for _ in range(self.settings.unit_rows)) for _ in range(self.settings.units)]

    def _unit(self, unit: int, place: int) -> CapturedUnit:
        first = unit * self.settings.unit_rows
        rollouts = tuple(replace(row, index=first + i, key=self.plan.keys[first + i]) for i, row in enumerate(self._texts[place]))
        return CapturedUnit(unit, rollouts, self._values[place], {}, {"kernel": "none"})


def like_a_residual_stream(rng: np.random.Generator, num_rows: int, num_layers: int, width: int) -> Float32:
    """(R, L, D): log-normal scales of the dims, a few massive ones, growth from layer to layer, rows near to a common mean."""
    scale_D = np.exp(rng.normal(0, 0.7, width)).astype(np.float32)
    scale_D[rng.choice(width, min(NUM_MASSIVE, width), replace=False)] *= 300
    growth_L = np.geomspace(1, 30, num_layers, dtype=np.float32)
    mean_LD = rng.standard_normal((num_layers, width), dtype=np.float32)
    noise_RLD = rng.standard_normal((num_rows, num_layers, width), dtype=np.float32)
    return (mean_LD + np.float32(0.3) * noise_RLD) * scale_D * growth_L[:, np.newaxis]


def _rollout(rng: np.random.Generator) -> Rollout:
    ids = np.minimum(rng.zipf(1.2, TEXT_TOKENS + ANSWER_TOKENS), VOCABULARY).astype(np.int32)
    words = [f"{number:x}" for number in ids]
    return Rollout(
        index=0,
        key=RowKey(ARCHETYPES[0], 0, 0),
        system_prompt=" ".join(words[: TEXT_TOKENS // 2]),
        question=" ".join(words[TEXT_TOKENS // 2 : TEXT_TOKENS]),
        response=" ".join(words[TEXT_TOKENS:]),
        token_ids=ids,
        response_start=TEXT_TOKENS,
        response_end=len(ids),
        finish_reason=FinishReason.STOP,
    )


def write(writer: UnitWriter, unit: CapturedUnit) -> None:
    """As a replica does it: is there a text already? Text, numbers, marker."""
    if writer.read_rollouts(unit.index) is not None:
        raise IntegrityError(f"{writer.url}: unit {unit.index:06d} is there already; the benchmark wants an empty place")
    writer.commit(replace(unit, rollouts=writer.write_rollouts(unit.index, unit.rollouts)))
