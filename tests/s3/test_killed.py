"""Writers killed at every step of a unit, and at random moments, several at once: committed exactly once, and nothing else changes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

import pytest

from persona_ray.store.address import open_backend
from persona_ray.store.finish import finish_store
from persona_ray.store.folder import FolderBackend
from persona_ray.store.ledger import Ledger
from persona_ray.store.reader import open_store
from persona_ray.store.repair import gc
from persona_ray.store.verify import verify
from tests.s3.checks import check_complete, objects_of
from tests.s3.conftest import ROOT, Place
from tests.s3.mortal import MOMENTS, Moment, death_of, dying_seed
from tests.s3.proxy import Fault
from tests.s3.writer import said_by, write_units
from tests.store.conftest import Toy

DAY_S = 86_400
SEED = "PERSONA_RAY_TEST_SEED"
FINISHER, STRAGGLER = 1, 2
SPOILT = {Moment.UNDERWAY: Fault.TORN, Moment.ARRIVED: Fault.LOST_REPLY}


def run_mortals(what: str, place: Place, toy: Toy, *numbers: int) -> str:
    """What they say at the end."""
    arguments = [what, place.url, toy.unit_rows, toy.rows, *numbers]
    command = [sys.executable, "-m", "tests.s3.mortal", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def keys_by_unit(toy: Toy, folder: Path) -> dict[int, list[str]]:
    """What an undisturbed writer creates, in order."""
    created: list[str] = []
    url = toy.prepare(folder)
    with pytest.MonkeyPatch.context() as patch:
        create = FolderBackend.create_once
        patch.setattr(FolderBackend, "create_once", lambda self, key, data: (created.append(key), create(self, key, data))[1])
        keys = {}
        for unit in toy.plan.units:
            created.clear()
            write_units(url, toy, FINISHER, [unit])
            keys[unit] = list(created)
    return keys


def test_killed_at_every_step_of_a_unit(place: Place, tmp_path: Path) -> None:
    num_steps = len(keys_by_unit(Toy(rows=4), tmp_path / "count")[0])
    assert num_steps == 7
    toy = Toy(rows=4 * num_steps * len(MOMENTS) - 1, unit_rows=4)
    keys = keys_by_unit(toy, tmp_path / "undisturbed")
    is_marker = [key.startswith("_commits/") for key in keys[0]]
    marker_step = is_marker.index(True)
    toy.prepare(place.url)
    deaths = {unit: death_of(unit) for unit in toy.plan.units}
    if place.service is not None:
        spoilt = {quote(keys[unit][step]): SPOILT[moment] for unit, (step, moment) in deaths.items() if moment in SPOILT}
        place.proxy.spoil_puts(spoilt)
    run_mortals("steps", place, toy, num_steps)
    if place.service is not None:
        place.proxy.heal()
    # What a death leaves is what was created until then, and nothing more.
    reached = {unit: step + (moment in {Moment.ARRIVED, Moment.AFTER}) for unit, (step, moment) in deaths.items()}
    left = {key for unit, num in reached.items() for key in keys[unit][:num]}
    there = set(open_backend(place.url).list_keys(""))
    assert there & {key for unit in toy.plan.units for key in keys[unit]} == left
    committed = Ledger(place.url).committed()
    assert committed == {unit for unit, num in reached.items() if num > marker_step}
    before = objects_of(place.url)
    assert not [report for report in verify(place.url).units if report.flaws and report.unit not in committed]

    write_units(place.url, toy, FINISHER)
    seeds = [FINISHER, *(dying_seed(unit) for unit in toy.plan.units)]
    check_complete(place.url, toy, seeds)
    markers = Ledger(place.url).markers()
    for unit, (texts,) in ((unit, open_store(place.url).rollouts([unit])) for unit in toy.plan.units):
        owner = dying_seed(unit) if reached[unit] > 0 else FINISHER
        assert {rollout.response for rollout in texts} == {said_by(owner)}, deaths[unit]
        maker = dying_seed(unit) if reached[unit] > marker_step else FINISHER
        assert markers[unit].made["seed"] == maker, deaths[unit]

    # Nothing is there that a writer without a mishap would not have left, but half-made files.
    finish_store(str(tmp_path / "undisturbed"))
    whole = objects_of(place.url)
    assert before.items() - {("zarr.json", before["zarr.json"])} <= whole.items()
    assert {key for key in whole if not key.startswith("_probe/")} == set(objects_of(str(tmp_path / "undisturbed")))
    write_units(place.url, toy, STRAGGLER)
    assert objects_of(place.url) == whole
    collected = gc(place.url, delete=True, clock=lambda: time.time() + 2 * DAY_S)
    assert {leftover.why for leftover in collected.leftovers} <= {"half-made temporary file"}
    assert open_backend(place.url).list_temporary() == []
    assert objects_of(place.url) == whole


def killed_at_random(place: Place, num_deaths: int) -> None:
    seed = int(os.environ.get(SEED) or random.SystemRandom().randrange(10**6))
    print(f"{place.url}: replay with {SEED}={seed}")
    # More units than so many writers can commit in their lives.
    toy = Toy(rows=4 * (num_deaths * 2 + 4) - 1, unit_rows=4)
    toy.prepare(place.url)
    begin_s = time.monotonic()
    assert run_mortals("random", place, toy, seed, num_deaths) == f"{num_deaths}\n"
    print(f"{num_deaths} writers died, {len(toy.plan.units)} units, {time.monotonic() - begin_s:.0f} s")
    seeds = list(range(1, num_deaths + 4))
    check_complete(place.url, toy, seeds)
    whole = objects_of(place.url)
    write_units(place.url, toy, seeds[-1] + 1)
    assert objects_of(place.url) == whole


@pytest.mark.long
@pytest.mark.timeout(900)
def test_fifty_random_deaths_of_writers_at_the_same_units(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        killed_at_random(place, 50)


def test_eight_random_deaths_of_writers_at_the_same_units(place: Place) -> None:
    killed_at_random(place, 8)
