"""Damage, found and requeued, and the run that makes it good: the same rows as before, bit by bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from persona_ray import cli, pipeline
from persona_ray.errors import IntegrityError
from persona_ray.store.reader import open_store
from persona_ray.store.verify import verify
from tests.cluster.runs import QUIET, assert_same_rows, files_of, job_for


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


DAMAGES: dict[int, tuple[str, Callable[[Path], None]]] = {
    0: ("rollouts/part-000000.parquet", flipped),
    1: ("activations/c/1/0/0", truncated),
    2: ("status/c/2", flipped),
    3: ("_commits/000003.json", truncated),
    5: ("activations/c/5/0/0", Path.unlink),
    6: ("rollouts/part-000006.parquet", Path.unlink),
}


def test_what_was_damaged_is_named_requeued_and_made_again(
    chat_model: Path, small_catalog: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = tmp_path / "store"
    shutil.copytree(finished, url)
    assert verify(str(url)).is_right
    for key, damage in DAMAGES.values():
        damage(url / key)
    spoiled = files_of(url)
    found = verify(str(url))
    assert found.wrong_units == tuple(DAMAGES)
    assert {flaw.key for report in found.units for flaw in report.flaws} == {key for key, _ in DAMAGES.values()}

    with pytest.raises(SystemExit) as end:
        cli.main(["store", "verify", str(url), "--requeue", "--json"])
    assert end.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert [done["unit"] for done in told["requeued"]] == list(DAMAGES)
    assert {done["unit"] for done in told["requeued"] if not done["keeps_text"]} == {0, 6}
    assert open_store(str(url)).ledger.committed() == {4, 7}

    outcome = pipeline.run(job_for(chat_model, small_catalog, url), QUIET)
    assert outcome.units_done == len(DAMAGES)
    assert_same_rows(finished, url)
    assert verify(str(url)).is_right
    after = files_of(url)
    intact = {key for key in spoiled if any(f"{unit:06d}" in key or f"/c/{unit}" in key for unit in (4, 7)) and "reduced" not in key}
    assert {key: after[key] for key in intact} == {key: spoiled[key] for key in intact}
    # Everything but markers (which hold times) and the results that bear the ledger's digest is as it was, to the bit.
    before = files_of(finished)
    names = [key for key in before if key.startswith(("rollouts/", "activations/", "response_", "finish_", "status/", "committed/"))]
    assert {key: after[key] for key in names} == {key: before[key] for key in names}


def test_without_a_requeue_a_run_does_not_build_on_damage(chat_model: Path, small_catalog: Path, finished: Path, tmp_path: Path) -> None:
    """A damaged text whose marker is gone stops the run; verify names it, and a requeue frees the way."""
    url = tmp_path / "store"
    shutil.copytree(finished, url)
    for key in ("_commits/000002.json", "committed/c/2"):
        (url / key).unlink()
    truncated(url / "rollouts/part-000002.parquet")
    with pytest.raises(IntegrityError, match=r"part-000002\.parquet"):
        pipeline.run(job_for(chat_model, small_catalog, url), QUIET)
    assert verify(str(url)).wrong_units == (2,)
    with pytest.raises(SystemExit) as end:
        cli.main(["store", "verify", str(url), "--requeue"])
    assert end.value.code == 0
    pipeline.run(job_for(chat_model, small_catalog, url), QUIET)
    assert_same_rows(finished, url)
    assert verify(str(url)).is_right
