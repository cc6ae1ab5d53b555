"""Runs that add to one store at the same time, from processes of their own, while somebody reads it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import numpy as np
import pytest

from persona_ray.store.address import open_backend
from persona_ray.store.ledger import Ledger
from persona_ray.store.marker import Marker, ObjectRecord, marker_key
from persona_ray.store.metadata import store_objects
from persona_ray.store.plans import read_plans
from persona_ray.store.prepare import prepare_store
from persona_ray.store.reader import open_store
from persona_ray.store.verify import verify
from tests.s3.appender import Asked, values_of
from tests.s3.conftest import ROOT, Place
from tests.store.conftest import Toy


def start(url: str, asked: Asked) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "tests.s3.appender", url, str(asked.questions), *asked.archetypes], cwd=ROOT)


def look(url: str) -> int:
    """Every row that a reader sees is right, and every unit is there as a whole."""
    store = open_store(url)
    rows = store.rows()
    seen = set(rows.rollout_N.tolist())
    units = {store.plans.unit_of(row) for row in seen}
    assert seen == {row for unit in units for row in store.plans.rows(unit)}
    names, questions = rows.archetype_names, rows.columns["question"].tolist()
    for place, values in enumerate(rows.activations()):
        np.testing.assert_array_equal(values, values_of_row(names[place], questions[place]))
    return len(rows)


def values_of_row(archetype: str, question: int) -> np.ndarray:
    from persona_ray.spec import RowKey

    return values_of(RowKey(archetype, 0, question, turn=1))


def test_two_processes_append_while_a_third_reads(place: Place) -> None:
    begun = Asked(("default", "bard"), 6)
    begun.run(place.url, seed=0)
    jobs = [Asked(("default", "bard", "sage", "pirate"), 8), Asked(("default", "bard", "ghost"), 12)]
    writers = [start(place.url, asked) for asked in jobs]
    numbers = [look(place.url)]
    while any(writer.poll() is None for writer in writers):
        numbers.append(look(place.url))
    assert [writer.returncode for writer in writers] == [0, 0]
    numbers.append(look(place.url))
    assert numbers == sorted(numbers), "nothing that was seen is lost again"
    wanted = {key for asked in (begun, *jobs) for key in asked.plan.keys}
    store = open_store(place.url)
    assert [text.key for text in store.rows().rollouts()] == list(dict.fromkeys(text.key for text in store.rows().rollouts()))
    assert {text.key for text in store.rows().rollouts()} == wanted
    assert numbers[-1] == len(wanted) == store.counts().asked
    found = verify(place.url)
    assert found.is_right
    assert not found.notes, "the last to end has brought the metadata up to date"


def test_claims_at_the_same_moment_neither_drop_nor_overlap(place: Place) -> None:
    jobs = [Asked(("default", f"role{number}", f"role{number + 1}"), 2 + number % 2) for number in range(5)]
    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(lambda asked: asked.prepare(place.url), jobs))
    plans = read_plans(open_backend(place.url))
    keys = [key for unit in plans.units for key in plans.keys(unit)]
    assert len(keys) == len(set(keys)) == plans.num_rows
    assert set(keys) == {key for asked in jobs for key in asked.plan.keys}
    assert json.loads(open_backend(place.url).get("zarr.json")) == json.loads(store_objects(plans)["zarr.json"])


def test_a_plan_is_added_while_units_of_the_first_are_being_written(place: Place) -> None:
    first = Asked(("default", "bard"), 20)
    first.prepare(place.url)
    writer = start(place.url, first)
    for questions in (21, 22, 23):
        Asked(("default", "bard", "sage"), questions).prepare(place.url)
        time.sleep(0.2)
    assert writer.wait() == 0
    Asked(("default", "bard", "sage"), 23).run(place.url, seed=3)
    assert look(place.url) == 3 * 23
    assert verify(place.url).is_right


@pytest.mark.parametrize("client", ["obstore", pytest.param("fsspec", marks=pytest.mark.long)])
def test_thousands_of_units_take_a_bounded_number_of_requests(
    client: str, service_name: str, make_place: Callable[[str, str], Place]
) -> None:
    """Resume: a listing of markers, one request for each 1,000. Opening: plans only. `info`: one GET for each marker."""
    remote = make_place(client, service_name)
    num_units = 5_000
    toy = Toy(rows=num_units, unit_rows=1, layers=(0,), hidden=1)
    prepare_store(remote.url, identity=toy.identity(), plan=toy.plan, job={"name": "many"})
    backend = open_backend(remote.url)
    made = datetime.now(UTC).isoformat(timespec="seconds")

    def commit(unit: int) -> None:
        objects = {f"rollouts/part-{unit:06d}.parquet": ObjectRecord(1, "0" * 64)}
        marker = Marker(unit=unit, first_row=unit, num_rows=1, objects=objects, refused={}, made={}, created=made)
        backend.create_once(marker_key(unit), marker.to_bytes())

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(commit, range(num_units - 1)))

    def info() -> None:
        assert open_store(remote.url).info()["units"] == {"planned": num_units, "committed": num_units - 1, "rows": 1}

    def resume() -> None:
        assert Ledger(remote.url).committed() == frozenset(range(num_units - 1))

    def prepare() -> None:
        prepare_store(remote.url, identity=toy.identity(), plan=toy.plan, job={"name": "many"})

    def requests_of(action: Callable[[], object]) -> int:
        with remote.proxy.log() as requests:
            action()
        return len(requests)

    pages = -(-num_units // 1000)
    # The second client asks for each object's size before it reads it.
    each = 2 if remote.url.startswith("fsspec") else 1
    assert requests_of(lambda: open_store(remote.url)) <= 2 + each * 1 + 2
    assert requests_of(resume) <= pages + 1
    assert requests_of(info) <= each * num_units + 4 * pages + 12 * each
    assert requests_of(prepare) <= 60 * each
