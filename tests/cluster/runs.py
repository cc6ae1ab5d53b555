"""Jobs of a small model, and what is in the stores that they fill."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from rich.console import Console

from persona_ray.config import Job, parse_job
from persona_ray.spec import Rollout, RowKey
from persona_ray.store.reader import open_store
from persona_ray.terminal import TerminalProgress

QUIET = TerminalProgress(Console(quiet=True))


def job_for(model: Path, catalog: Path, url: Path, /, **sections: dict[str, Any]) -> Job:
    """Four archetypes, two prompts, four questions: 32 rows in eight units. `sections` add to those of the job."""
    document: dict[str, Any] = {
        "name": "test",
        "model": {"id": str(model), "dtype": "float32"},
        "shards": {"gpus_per_shard": 0},
        "catalog": {"source": str(catalog), "system_prompts": 2, "questions": 4},
        "rollouts": {"max_new_tokens": 12, "temperature": 1.0},
        "capture": {"max_length": 128},
        "store": {"url": str(url), "dtype": "float32", "unit_rows": 4},
        "reduce": {"min_count": 1},
    }
    return parse_job(document | {name: document.get(name, {}) | values for name, values in sections.items()})


def rows_of(url: Path) -> dict[RowKey, tuple[Rollout, bytes]]:
    """Every row with its text and the bits of its activations."""
    store = open_store(str(url))
    units = sorted(store.ledger.committed())
    values = {
        int(row): means.tobytes()
        for rows in store.scored_rows(units, None)
        for row, means in zip(rows.rollout_R, rows.activations_RLD, strict=True)
    }
    return {rollout.key: (rollout, values.get(rollout.index, b"")) for part in store.rollouts(units) for rollout in part}


def assert_same_rows(one: Path, other: Path) -> None:
    rows, others = rows_of(one), rows_of(other)
    assert rows.keys() == others.keys()
    for key, (rollout, bits) in rows.items():
        assert others[key][1] == bits, key
        assert others[key][0].token_ids.tolist() == rollout.token_ids.tolist(), key


def files_of(folder: Path) -> dict[str, str]:
    """Digest of every object that is written once."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in {"zarr.json", "latest.json"})
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def bits_of(url: Path) -> dict[int, tuple[bytes, bytes]]:
    """Row -> its token ids and its activations; of all that are stored."""
    store = open_store(str(url))
    units = sorted(store.ledger.committed())
    texts = {rollout.index: rollout.token_ids.tobytes() for part in store.rollouts(units) for rollout in part}
    return {
        int(row): (texts[int(row)], means_LD.tobytes())
        for rows in store.scored_rows(units, None)
        for row, means_LD in zip(rows.rollout_R, rows.activations_RLD, strict=True)
    }
