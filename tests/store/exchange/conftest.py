"""A toy store with everything that an export meets: a unit that is not committed, refused rows, a judge, a result."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from persona_ray.config import ReduceConfig
from persona_ray.reduce.merging import in_process
from persona_ray.reduce.moments import Moments
from persona_ray.reduce.persona_space import Block, persona_space
from persona_ray.spec import Judgement, Reduced
from persona_ray.store.reader import StoreReader, open_store
from persona_ray.store.reduced import publish_reduced, write_reduced
from persona_ray.store.scores import ScoreWriter, publish_scores

ROWS, UNIT_ROWS = 43, 5
UNCOMMITTED = 4
REFUSED = {1: "empty answer", 2: "empty answer", 13: "activations are not finite"}
LEFT_OUT = {"empty answer": 2, "activations are not finite": 1}
SCORES = (3, 2, 3, 0, -1)


def judge_all(store: StoreReader, name: str = "lexicon-test") -> None:
    """Scores for every committed unit."""
    writer = ScoreWriter(store.url, name, {"backend": "lexicon"})
    for unit in sorted(store.ledger.committed()):
        (rollouts,) = store.rollouts([unit])
        writer.write(unit, rollouts, [Judgement(SCORES[rollout.index % 5], "as given") for rollout in rollouts])
    publish_scores(store.url, name)


def reduce_all(store: StoreReader, min_count: int = 2) -> Reduced:
    """As the end of a run does it, in this process."""
    judge, units = store.latest_scores(), sorted(store.ledger.committed())
    reduced = persona_space(
        [Block(store.layers, in_process(lambda units: store.scored_rows(units, judge), units, Moments.of))],
        archetypes=store.archetypes,
        default_archetypes=store.default_archetypes,
        config=ReduceConfig(min_score=3, min_count=min_count, somewhat=False),
        judge_name=judge,
        ledger_digest=store.snapshot().digest,
    )
    write_reduced(store.url, reduced)
    publish_reduced(store.url, reduced.name)
    return reduced


@pytest.fixture(scope="session")
def make_store(make_toy: Callable[..., Any]) -> Callable[..., StoreReader]:
    """A store of `ROWS` rows without unit `UNCOMMITTED`, judged and reduced."""

    def make(url: Path, **changes: Any) -> StoreReader:
        toy = make_toy(**({"rows": ROWS, "unit_rows": UNIT_ROWS, "archetypes": ("default", "bard", "sage", "ghost")} | changes))
        toy.prepare(url)
        for unit in toy.plan.units:
            if unit != UNCOMMITTED:
                toy.fill(url, units=range(unit, unit + 1), refused=REFUSED)
        store = open_store(str(url))
        judge_all(store)
        reduce_all(store)
        return store

    return make


@pytest.fixture(scope="session")
def store(make_store: Callable[..., StoreReader], tmp_path_factory: pytest.TempPathFactory) -> StoreReader:
    """To be read only."""
    return make_store(tmp_path_factory.mktemp("exchange") / "store")


@pytest.fixture(scope="session")
def empty_store(make_toy: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> StoreReader:
    """Planned, and nothing committed."""
    return open_store(make_toy().prepare(tmp_path_factory.mktemp("exchange") / "empty"))


@pytest.fixture(scope="session")
def expected(store: StoreReader) -> dict[int, tuple[Any, int, np.ndarray]]:
    """Row -> rollout, score and activations of what is committed and stored."""
    return rows_of(store)


def rows_of(store: StoreReader) -> dict[int, tuple[Any, int, np.ndarray]]:
    """Row -> rollout, score and activations."""
    units = sorted(store.ledger.committed())
    texts = {rollout.index: rollout for part in store.rollouts(units) for rollout in part}
    return {
        row: (texts[row], score, values_LD)
        for part in store.scored_rows(units, store.latest_scores())
        for row, score, values_LD in zip(part.rollout_R.tolist(), part.score_R.tolist(), part.activations_RLD, strict=True)
    }


def without_us(code: str, *arguments: object) -> Any:
    """What `code` leaves in `answer` (plain JSON values), run where persona_ray cannot be imported."""
    script = "import sys, json\nsys.modules['persona_ray'] = None\n" + textwrap.dedent(code) + "\nprint('\\n' + json.dumps(answer))"
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False, cwd="/", timeout=200
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
