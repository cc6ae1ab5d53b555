"""Whole units through faults, rivals and sudden deaths: what is committed is complete, of one attempt, and never changes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import zarr

from persona_ray.errors import InputError
from persona_ray.metrics import STORE_RETRIES, recorded_by
from persona_ray.store.address import open_backend
from persona_ray.store.reader import open_store
from tests.recording import Records
from tests.s3.checks import check_committed, check_complete
from tests.s3.conftest import ROOT, Place
from tests.s3.proxy import Fault
from tests.s3.writer import write_units
from tests.store.conftest import Toy

FAULT_RATE = 0.1


@pytest.fixture(autouse=True)
def _short_hangs(remote_or_folder: Place) -> None:
    if remote_or_folder.service is not None:
        remote_or_folder.proxy.hang_s = 1.0


@pytest.fixture
def remote_or_folder(request: pytest.FixtureRequest) -> Place:
    """The test's own place, of either kind."""
    name = "place" if "place" in request.fixturenames else "remote"
    place: Place = request.getfixturevalue(name)
    return place


def start_writer(url: str, toy: Toy, seed: int) -> subprocess.Popen[str]:
    """A writer that has begun."""
    arguments = [sys.executable, "-m", "tests.s3.writer", url, str(seed), str(toy.unit_rows), str(toy.rows)]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def write_through_faults(place: Place, toy: Toy, rate: float, num_threads: int = 1) -> tuple[int, int]:
    """Operations (requests that were answered) and faults while a whole job is written; then all of it is read, with faults and without."""
    place.proxy.spoil_at_random(rate, seed=1)
    with place.proxy.log() as requests:
        toy.prepare(place.url)
        write_units(place.url, toy, seed=0, num_threads=num_threads)
    check_complete(place.url, toy, [0])
    place.proxy.heal()
    check_complete(place.url, toy, [0])
    num_faults = sum(request.fault is not None for request in requests)
    return len(requests) - num_faults, num_faults


def test_whole_units_through_random_faults(remote: Place, toy: Toy) -> None:
    records = Records()
    with recorded_by(records):
        num_operations, num_faults = write_through_faults(remote, toy, FAULT_RATE)
    assert num_operations > 200
    assert num_faults > 10
    assert records.of(STORE_RETRIES)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_two_thousand_operations_through_random_faults(remote: Place, capsys: pytest.CaptureFixture[str]) -> None:
    begin_s = time.monotonic()
    num_operations, num_faults = write_through_faults(remote, Toy(rows=260 * 4 - 1, unit_rows=4), FAULT_RATE, num_threads=4)
    with capsys.disabled():
        print(f"\n{remote.url}: {num_operations} operations, {num_faults} spoilt besides, {time.monotonic() - begin_s:.0f} s")
    assert num_operations >= 2000


def test_three_writers_of_the_same_units(place: Place) -> None:
    """In different orders, with different values and texts, and on a service with faults as well."""
    toy = Toy(rows=46, unit_rows=4)
    toy.prepare(place.url)
    if place.service is not None:
        place.proxy.spoil_at_random(FAULT_RATE / 2, seed=2)
    writers = [start_writer(place.url, toy, seed) for seed in (1, 2, 3)]
    assert [writer.wait(timeout=240) for writer in writers] == [0, 0, 0]
    if place.service is not None:
        place.proxy.heal()
    check_complete(place.url, toy, [1, 2, 3])


def test_writers_that_die_at_any_moment(place: Place) -> None:
    """Each with other values; what one has committed no later one changes, and the last one finds the rest to do."""
    toy, dice = Toy(rows=46, unit_rows=4), random.Random(3)
    toy.prepare(place.url)
    committed: dict[str, str] = {}
    seeds = list(range(1, 7))
    for seed in seeds:
        writer = start_writer(place.url, toy, seed)
        time.sleep(dice.uniform(0, 0.4))
        writer.kill()
        writer.wait()
        found = check_committed(place.url, toy, seeds)
        assert committed.items() <= found.items()
        committed = found
    assert start_writer(place.url, toy, 7).wait(timeout=240) == 0
    final = check_complete(place.url, toy, [*seeds, 7])
    assert committed.items() <= final.items()


def test_zarr_reads_say_no_more_of_a_fault_than_others(remote: Place) -> None:
    toy = Toy(rows=10, unit_rows=4)
    toy.prepare(remote.url)
    write_units(remote.url, toy, seed=1)
    array = zarr.open_array(open_backend(remote.url).zarr_store(), path="activations", mode="r")
    remote.proxy.spoil(Fault.EXPIRED, 10_000)
    with pytest.raises(InputError, match="the credentials have expired; renew them") as caught:
        np.asarray(array[:4])
    assert "testkey" not in str(caught.value)


def test_a_straggler_changes_nothing(place: Place) -> None:
    toy = Toy(rows=10, unit_rows=4)
    toy.prepare(place.url)
    write_units(place.url, toy, seed=1)
    before = check_complete(place.url, toy, [1])
    write_units(place.url, toy, seed=2)
    assert check_complete(place.url, toy, [1]) == before


def test_a_reader_needs_no_right_to_write(remote: Place) -> None:
    toy = Toy(rows=10, unit_rows=4)
    toy.prepare(remote.url)
    write_units(remote.url, toy, seed=1)
    remote.proxy.spoil(Fault.DENIED, 10_000, {"PUT", "POST", "DELETE"})
    check_committed(remote.url, toy, [1])
    assert open_store(remote.url).info()["url"] == remote.url
