"""One writer as a process of its own: `python -m tests.s3.writer URL SEED UNIT_ROWS ROWS`. Says `begun` when it begins to write.

Values and texts differ with the seed, as those of another attempt on another GPU do; the order of units does, too.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from persona_ray.spec import Float32, Rollout
from persona_ray.store.writer import UnitWriter
from tests.store.conftest import Toy


def said_by(seed: int) -> str:
    """What a writer's rollouts answer."""
    return "Aye." + " Aye." * seed


def values_of(toy: Toy, unit: int, seed: int, texts: tuple[Rollout, ...]) -> Float32:
    """What writer `seed` captures from those texts: another text, other values."""
    num_tokens_R = np.array([len(rollout.token_ids) for rollout in texts], dtype=np.float32)
    return np.asarray(toy.activations(unit, seed) + num_tokens_R[:, np.newaxis, np.newaxis], dtype=np.float32)


def write_unit(writer: UnitWriter, toy: Toy, unit: int, seed: int) -> None:
    """Text first, whoever wrote it; then what it gives."""
    texts = writer.read_rollouts(unit) or writer.write_rollouts(unit, toy.rollouts(unit, said=said_by(seed)))
    writer.commit(toy.captured(unit, seed=seed, rollouts=texts, activations=values_of(toy, unit, seed, texts)))


def write_units(url: str, toy: Toy, seed: int, units: Iterable[int] | None = None, num_threads: int = 1) -> None:
    """Every unit, or those given, each committed by whoever comes first; by several threads with a writer each, as in a replica."""
    order = list(toy.plan.units if units is None else units)
    random.Random(seed).shuffle(order)

    def write(units: list[int]) -> None:
        writer = UnitWriter(url)
        for unit in units:
            write_unit(writer, toy, unit, seed)

    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(write, [order[i::num_threads] for i in range(num_threads)]))


if __name__ == "__main__":
    url, seed, unit_rows, rows = sys.argv[1], *map(int, sys.argv[2:])
    print("begun", flush=True)
    write_units(url, Toy(rows=rows, unit_rows=unit_rows), seed)
