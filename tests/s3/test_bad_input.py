"""What is wrong with a place is said in one line, before anything is written; the exit code follows from the error."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

import pytest

from persona_ray.errors import EXIT_FAILED, EXIT_INPUT, InputError, PersonaRayError
from persona_ray.store import cloud, filesystem
from persona_ray.store.address import open_backend
from persona_ray.store.ledger import Ledger
from persona_ray.store.prepare import check_store, prepare_store
from persona_ray.store.reader import open_store
from persona_ray.store.remote import Patience
from persona_ray.store.verify import verify
from persona_ray.store.writer import UnitWriter
from tests.s3.checks import check_complete
from tests.s3.conftest import Place
from tests.s3.proxy import Fault
from tests.s3.writer import write_unit, write_units
from tests.store.conftest import Toy

TOY = Toy(rows=7)
BEGIN: dict[str, Callable[..., object]] = {
    "check_store": lambda url, **job: check_store(url, identity=TOY.identity(**job), plan=TOY.plan),
    "prepare_store": lambda url, **job: prepare_store(url, identity=TOY.identity(**job), plan=TOY.plan, job={}),
}
READ: dict[str, Callable[[str], object]] = {"open_store": open_store, "verify": verify}


@pytest.fixture(autouse=True)
def _impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    short = Patience(total_s=1.0, request_s=5, first_wait_s=0.05, longest_wait_s=0.2)
    for client in (cloud, filesystem):
        monkeypatch.setattr(client, "PATIENT", short)
        monkeypatch.setattr(client, "HASTY", short)


def complaint(place: Place, act: Callable[[str], object], url: str | None = None) -> PersonaRayError:
    """The error, which is one line without credentials; nothing has been written."""
    before = place.contents()
    with pytest.raises(PersonaRayError) as caught:
        act(url or place.url)
    said = str(caught.value)
    assert "\n" not in said
    assert "testkey" not in said
    assert "testsecret" not in said
    assert place.contents() == before
    return caught.value


@pytest.mark.parametrize("act", [*BEGIN, *READ])
def test_no_service_at_the_endpoint(remote: Place, act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    error = complaint(remote, (BEGIN | READ)[act])
    assert "127.0.0.1:9" in str(error)
    assert error.exit_code == (EXIT_INPUT if act in BEGIN else EXIT_FAILED)


@pytest.mark.parametrize("act", [*BEGIN, *READ])
def test_no_credentials(remote: Place, act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/nonexistent")
    error = complaint(remote, (BEGIN | READ)[act])
    assert "no credentials were found" in str(error)
    assert act in READ or error.exit_code == EXIT_INPUT


@pytest.mark.parametrize("act", [*BEGIN, *READ])
def test_no_such_bucket(remote: Place, act: str) -> None:
    error = complaint(remote, (BEGIN | READ)[act], remote.url.replace(remote.bucket, "nobody-made-this-one"))
    assert "there is no such bucket; create it first" in str(error)
    assert error.exit_code == EXIT_INPUT


@pytest.mark.parametrize("act", BEGIN)
@pytest.mark.parametrize("is_filled", [False, True])
def test_a_bucket_that_may_only_be_read(remote: Place, act: str, is_filled: bool) -> None:
    if is_filled:
        TOY.fill(remote.url)
    remote.proxy.spoil(Fault.DENIED, 10_000, {"PUT", "POST", "DELETE"})
    error = complaint(remote, BEGIN[act])
    assert "AccessDenied" in str(error)
    assert "the right to list, read and write" in str(error)
    assert error.exit_code == EXIT_INPUT
    if is_filled:
        assert open_store(remote.url).identity == TOY.identity().as_dict()
        assert verify(remote.url).is_right


def test_credentials_that_expire_in_the_middle_of_a_unit(remote: Place) -> None:
    toy = Toy(rows=8)
    toy.prepare(remote.url)
    write_units(remote.url, toy, 1, [0])
    writer = UnitWriter(remote.url)
    writer.write_rollouts(1, toy.rollouts(1, said="Aye. Aye."))
    remote.proxy.spoil(Fault.EXPIRED, 10_000)
    error = complaint(remote, lambda _: write_unit(writer, toy, 1, 2))
    assert isinstance(error, InputError)
    assert "the credentials have expired; renew them, and run the same command again" in str(error)
    remote.proxy.heal()
    assert Ledger(remote.url).committed() == {0}
    write_units(remote.url, toy, 2)
    check_complete(remote.url, toy, [1, 2])


@pytest.mark.parametrize("act", [*BEGIN, *READ])
def test_a_place_that_is_no_store(place: Place, act: str) -> None:
    place.put("thesis/chapter-1.txt", b"Call me Ishmael.")
    error = complaint(place, (BEGIN | READ)[act])
    assert ("no persona_ray store, and not empty" if act in BEGIN else "no persona_ray store here") in str(error)
    assert error.exit_code == EXIT_INPUT


@pytest.mark.parametrize("act", [*BEGIN, *READ])
def test_a_store_of_a_newer_schema(place: Place, act: str) -> None:
    TOY.fill(place.url)
    plan_key, root_key = "_plans/000000.json", "zarr.json"
    backend = open_backend(place.url)
    plan, root = (json.loads(backend.get(key)) for key in (plan_key, root_key))
    assert plan["schema_version"] == root["attributes"]["schema_version"]
    plan["schema_version"] = root["attributes"]["schema_version"] = 99
    place.put(plan_key, json.dumps(plan).encode())
    place.put(root_key, json.dumps(root).encode())
    error = complaint(place, (BEGIN | READ)[act])
    assert "has schema 99" in str(error)
    assert "update persona_ray" in str(error)
    assert error.exit_code == EXIT_INPUT


@pytest.mark.parametrize("act", BEGIN)
def test_a_store_of_another_job(place: Place, act: str) -> None:
    TOY.fill(place.url)
    error = complaint(place, partial(BEGIN[act], model_id="other/model"))
    assert "belongs to another experiment: model_id is 'toy/model' in the store, 'other/model' in the job" in str(error)
    assert error.exit_code == EXIT_INPUT
