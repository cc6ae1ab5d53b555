"""One suite for every backend: what `Backend` promises, on a folder and through both clients on a real S3 protocol."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import obstore
import pytest
from obstore import exceptions

from persona_ray.errors import InputError, IntegrityError, RetryableError, StateError
from persona_ray.store.address import open_backend
from persona_ray.store.backend import Backend, StoredObject
from persona_ray.store.finish import finish_store
from persona_ray.store.ledger import Ledger
from persona_ray.store.reader import open_store
from persona_ray.store.remote import Patience, RemoteBackend
from persona_ray.store.verify import verify
from tests.s3.conftest import Place
from tests.s3.proxy import LASTING, PASSING, Fault
from tests.store.conftest import Toy

MINUTE_S = 60
DELETIONS = frozenset({"DELETE", "POST"})
"""One object, or a list of them."""
IMPATIENT = Patience(total_s=1.0, request_s=5, first_wait_s=0.05, longest_wait_s=0.2)


def remote_backend(place: Place, patience: Patience | None = None) -> RemoteBackend:
    backend = open_backend(place.url)
    assert isinstance(backend, RemoteBackend)
    if patience is not None:
        backend.patience = patience
    return backend


def test_the_first_writer_wins(place: Place) -> None:
    first, second = open_backend(place.url), open_backend(place.url)
    one = StoredObject(3, hashlib.sha256(b"one").hexdigest(), is_ours=True)
    assert first.create_once("a/b", b"one") == one
    assert second.create_once("a/b", b"other") == StoredObject(one.num_bytes, one.sha256, is_ours=False)
    assert second.create_once("a/b", b"one") == one
    assert first.get("a/b") == b"one"


def test_of_many_writers_at_once_exactly_one_wins(place: Place) -> None:
    backend = open_backend(place.url)
    barrier = threading.Barrier(6)
    answers: list[StoredObject] = []

    def write(number: int, key: str) -> None:
        barrier.wait()
        answers.append(backend.create_once(key, bytes([number]) * 5000))

    for key in ("deep/down/0", "deep/down/1", "deep/down/2"):
        answers.clear()
        threads = [threading.Thread(target=write, args=(number, key)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [answer.is_ours for answer in answers].count(True) == 1
        assert {answer.sha256 for answer in answers} == {hashlib.sha256(backend.get(key)).hexdigest()}


def test_objects_of_any_size_come_back(place: Place) -> None:
    backend = open_backend(place.url)
    for num_bytes in (0, 1, 5000, 3_000_001):
        data = hashlib.shake_128(b"x").digest(num_bytes)
        assert backend.create_once(f"size/{num_bytes}", data).num_bytes == num_bytes
        assert backend.get(f"size/{num_bytes}") == data


def test_a_missing_object_is_none_or_an_error_in_words(place: Place) -> None:
    backend = open_backend(place.url)
    assert backend.get_or_none("a/b") is None
    with pytest.raises(IntegrityError, match="a/b is missing"):
        backend.get("a/b")


PARTS = [(0, 1), (2, 5), (0, 10), (8, 15), (10, 12), (12, 15), (0, None), (4, None), (12, None), (-1, None), (-10, None), (-40, None)]


def test_a_part_of_an_object_is_a_slice_of_its_bytes(place: Place) -> None:
    backend = open_backend(place.url)
    for key, data in {"ten": b"0123456789", "one": b"0", "none": b""}.items():
        backend.create_once(key, data)
        for start, stop in PARTS:
            assert backend.get_part(key, start, stop) == data[start:stop], (key, start, stop)
    assert {backend.part_or_none("absent", start, stop) for start, stop in PARTS} == {None}
    with pytest.raises(IntegrityError, match="absent is missing"):
        backend.get_part("absent", -1)


def test_a_part_is_one_request_that_moves_no_more(remote: Place) -> None:
    backend = open_backend(remote.url)
    backend.create_once("a", bytes(100_000))
    for (start, stop), asked in {(10, 500): "bytes=10-499", (-40, None): "bytes=-40"}.items():
        with remote.proxy.log() as requests:
            assert len(backend.get_part("a", start, stop)) == (stop or 0) - start
        assert [(request.method, request.headers.get("range")) for request in requests] == [("GET", asked)]


def test_a_service_that_counts_from_the_beginning_alone(
    make_place: Callable[[str, str], Place], service_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Azure does: its client refuses to ask for the end."""
    backend, get = open_backend(make_place("obstore", service_name).url), obstore.get

    def refusing(store: Any, key: str, *, options: Any = None) -> Any:
        if "suffix" in (options or {}).get("range", ()):
            raise exceptions.NotSupportedError("suffix requests")
        return get(store, key, options=options)

    backend.create_once("ten", b"0123456789")
    backend.create_once("none", b"")
    monkeypatch.setattr(obstore, "get", refusing)
    assert [backend.get_part("ten", start) for start in (-1, -10, -40)] == [b"9", b"0123456789", b"0123456789"]
    assert backend.get_part("none", -4) == b""
    assert backend.part_or_none("absent", -4) is None


def test_one_layer_moves_one_layer_whatever_happens(remote: Place) -> None:
    """Of every object of numbers the index and the one inner chunk; requests that fail are made again."""
    toy = Toy(rows=7, layers=(0, 2, 4, 6), hidden=64)
    store = open_store(toy.fill(remote.url))
    whole_NLD = store.rows().activations()
    for layer, seed in ((2, 0), (4, 1)):
        remote.proxy.hang_s = 0.2
        remote.proxy.spoil_at_random(0.3, seed, (Fault.SLOW_DOWN, Fault.TRUNCATED, Fault.LOST_REPLY), {"GET"})
        try:
            with remote.proxy.log() as requests:
                found_ND = store.rows([layer]).layer(layer)
        finally:
            remote.proxy.heal()
        np.testing.assert_array_equal(found_ND, whole_NLD[:, toy.layers.index(layer)])
        asked = {(request.path, request.headers.get("range")) for request in requests if "/activations/" in request.path}
        assert None not in {part for _, part in asked}
        assert len(asked) == len(toy.plan.units) * (2 if layer == 2 else 1)


def test_listings(place: Place) -> None:
    backend = open_backend(place.url)
    assert backend.list_keys("") == backend.list_folders("") == []
    assert backend.first_foreign_key() is None
    for key in ("b/2", "a", "b/1", "b/c/3", "bb/4", "d e/\N{SNOWMAN}"):
        backend.create_once(key, b"")
    assert backend.list_keys("") == ["a", "b/1", "b/2", "b/c/3", "bb/4", "d e/\N{SNOWMAN}"]
    assert backend.list_keys("b") == ["b/1", "b/2", "b/c/3"]
    assert backend.list_keys("absent") == backend.list_folders("absent") == []
    assert [name for name in backend.list_folders("") if name != "_tmp"] == ["b", "bb", "d e"]
    assert backend.list_folders("b") == ["b/c"]
    assert backend.first_foreign_key() is not None
    assert backend.get_many(["b/1", "a"]) == [b"", b""]


def test_objects_are_listed_with_size_and_date(place: Place) -> None:
    backend = open_backend(place.url)
    assert backend.list_objects("") == []
    sizes = {"a": 3, "b/1": 0, "b/2": 70_000, "bb/3": 1}
    for key, num_bytes in reversed(sizes.items()):
        backend.create_once(key, bytes(num_bytes))
    found = backend.list_objects("")
    assert [(item.key, item.num_bytes) for item in found] == list(sizes.items())
    # Services round to seconds.
    assert all(abs(item.modified_s - time.time()) < MINUTE_S for item in found)
    assert backend.list_objects("b") == [item for item in found if item.key.startswith("b/")]
    assert backend.list_objects("absent") == backend.list_temporary() == []


def test_what_is_deleted_is_gone_and_what_is_absent_is_no_fault(place: Place) -> None:
    backend = open_backend(place.url)
    for key in ("b/1", "b/2", "b/10"):
        backend.create_once(key, b"123")
    for _ in range(2):
        backend.delete("b/1")
        assert backend.get_or_none("b/1") is None
        assert backend.list_keys("") == ["b/10", "b/2"]
    backend.delete("never/there")
    assert backend.create_once("b/1", b"again").is_ours
    assert backend.get("b/1") == b"again"


def test_a_deletion_whose_reply_is_lost_is_done(remote: Place) -> None:
    backend = open_backend(remote.url)
    backend.create_once("a", b"data")
    remote.proxy.spoil(Fault.LOST_REPLY, 2, DELETIONS)
    backend.delete("a")
    assert backend.list_keys("") == []


def forbid_deletions(place: Place) -> None:
    """By a policy where the service keeps it, else by the proxy."""
    assert place.service is not None
    if place.service.name == "moto":
        place.proxy.spoil(Fault.DENIED, 10_000, DELETIONS)
        return
    denied = {"Effect": "Deny", "Principal": "*", "Action": "s3:DeleteObject", "Resource": f"arn:aws:s3:::{place.bucket}/*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [denied]})
    place.service.client().put_bucket_policy(Bucket=place.bucket, Policy=policy)


def test_without_the_right_to_delete_one_line_says_what_needs_it(remote: Place) -> None:
    backend = open_backend(remote.url)
    backend.create_once("a", b"data")
    forbid_deletions(remote)
    with pytest.raises(InputError, match=r"deleting a, for which repair and gc need the right to delete, .*AccessDenied") as caught:
        backend.delete("a")
    assert "\n" not in str(caught.value)
    assert "testkey" not in str(caught.value)
    assert backend.get("a") == b"data"


def test_whoever_may_not_delete_can_prepare_write_commit_and_verify(remote: Place) -> None:
    forbid_deletions(remote)
    toy = Toy(rows=7)
    with remote.proxy.log() as requests:
        url = toy.fill(remote.url)
        finish_store(url)
        assert verify(url).is_right
    assert Ledger(url).committed() == frozenset(toy.plan.units)
    assert not [request for request in requests if request.method in DELETIONS]


def test_a_neighbour_with_a_longer_name_is_another_store(place: Place) -> None:
    open_backend(f"{place.url}-more").create_once("a", b"")
    assert open_backend(place.url).list_keys("") == []
    assert open_backend(place.url).first_foreign_key() is None


def test_listings_of_more_than_a_page(remote: Place) -> None:
    assert remote.service is not None
    client = remote.service.client()
    prefix = remote.url.partition(remote.bucket)[2].strip("/")
    wanted = [f"_commits/{unit:06d}.json" for unit in range(1005)] + ["zarr.json"]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: client.put_object(Bucket=remote.bucket, Key=f"{prefix}/{key}", Body=b""), wanted))
    backend = open_backend(remote.url)
    assert backend.list_keys("") == wanted
    assert backend.list_keys("_commits") == wanted[:-1]
    assert [item.key for item in backend.list_objects("")] == wanted
    assert [(item.key, item.num_bytes) for item in backend.list_objects("_commits")] == [(key, 0) for key in wanted[:-1]]
    assert backend.list_folders("") == ["_commits"]


def test_only_metadata_and_latest_may_be_replaced(place: Place) -> None:
    backend = open_backend(place.url)
    for key in ("a/zarr.json", "scores/latest.json"):
        backend.replace(key, b"1")
        backend.replace(key, b"2")
        assert backend.get(key) == b"2"
    with pytest.raises(StateError, match="write-once"):
        backend.replace("_commits/000000.json", b"1")


def test_the_probe_passes_again_and_again_and_needs_no_right_to_delete(place: Place) -> None:
    if place.service is not None:
        place.proxy.spoil(Fault.DENIED, 1000, {"DELETE"})
    backend = open_backend(place.url)
    for _ in range(3):
        backend.probe_write_once()
    assert backend.first_foreign_key() is None


def test_the_probe_refuses_a_service_that_ignores_conditions(remote: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = remote_backend(remote)
    conditional = backend._put
    monkeypatch.setattr(backend, "_put", lambda key, data, *, is_new: conditional(key, data, is_new=False))
    with pytest.raises(InputError, match="ignores conditional writes"):
        backend.probe_write_once()


def test_every_put_of_a_new_object_is_one_conditional_request(remote: Place) -> None:
    """Never multipart: its completion is not conditional everywhere."""
    backend = open_backend(remote.url)
    with remote.proxy.log() as requests:
        backend.create_once("large", bytes(120 * 2**20))
    puts = [request for request in requests if request.method == "PUT"]
    assert [request.headers.get("if-none-match") for request in puts] == ["*"]
    assert not [request for request in requests if request.method == "POST"]


@pytest.mark.parametrize("fault", PASSING)
def test_a_passing_fault_of_a_create_is_survived(remote: Place, fault: Fault) -> None:
    backend = open_backend(remote.url)
    remote.proxy.hang_s = 0.5
    remote.proxy.spoil(fault, 2, {"PUT"})
    with remote.proxy.log() as requests:
        assert backend.create_once("a", b"mine" * 50_000).is_ours
    assert fault in {request.fault for request in requests}
    assert backend.get("a") == b"mine" * 50_000


@pytest.mark.parametrize("fault", PASSING)
def test_a_passing_fault_hides_no_earlier_object(remote: Place, fault: Fault) -> None:
    backend = open_backend(remote.url)
    backend.create_once("a", b"first")
    remote.proxy.hang_s = 0.5
    remote.proxy.spoil(fault, 3)
    assert not backend.create_once("a", b"second").is_ours
    assert backend.get("a") == b"first"


@pytest.mark.parametrize("fault", PASSING)
def test_a_passing_fault_of_a_read_or_a_listing_is_survived(remote: Place, fault: Fault) -> None:
    backend = open_backend(remote.url)
    data = hashlib.shake_128(b"y").digest(200_000)
    backend.create_once("a/b", data)
    remote.proxy.hang_s = 0.5
    remote.proxy.spoil(fault, 2, {"GET", "HEAD"})
    assert backend.get_or_none("a/b") == data
    for start, stop in ((-50_000, None), (70_000, 140_000)):
        remote.proxy.spoil(fault, 2, {"GET"})
        assert backend.get_part("a/b", start, stop) == data[start:stop]
    remote.proxy.spoil(fault, 2, {"GET"})
    assert backend.list_keys("") == ["a/b"]


@pytest.mark.parametrize("fault", [Fault.SLOW_DOWN, Fault.CONFLICT, Fault.INTERNAL])
def test_a_fault_that_does_not_pass_ends_in_one_line_after_the_stated_time(remote: Place, fault: Fault) -> None:
    backend = remote_backend(remote, IMPATIENT)
    remote.proxy.spoil(fault, 10_000)
    with pytest.raises(RetryableError) as caught:
        backend.create_once("a", b"data")
    said = str(caught.value)
    assert said.startswith(f"{remote.url}: creating a failed for 1 s (")
    assert fault in said
    assert "\n" not in said


@pytest.mark.parametrize("fault", sorted(LASTING))
@pytest.mark.parametrize("act", ["create_once", "get_or_none", "get_part", "list_keys", "replace"])
def test_a_lasting_fault_ends_at_once_and_shows_no_credentials(remote: Place, fault: Fault, act: str) -> None:
    acts: dict[str, Callable[[Backend], object]] = {
        "create_once": lambda backend: backend.create_once("a", b""),
        "get_or_none": lambda backend: backend.get_or_none("a"),
        "get_part": lambda backend: backend.get_part("a", -1),
        "list_keys": lambda backend: backend.list_keys(""),
        "replace": lambda backend: backend.replace("zarr.json", b""),
    }
    backend = open_backend(remote.url)
    remote.proxy.spoil(fault, 10_000)
    with remote.proxy.log() as requests, pytest.raises(InputError) as caught:
        acts[act](backend)
    assert len(requests) <= 2
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    said = str(caught.value)
    assert fault in said
    assert "\n" not in said
    assert "testkey" not in said
    assert "Signature" not in said


def test_who_may_only_read_can_read(remote: Place) -> None:
    open_backend(remote.url).create_once("a/b", b"data")
    remote.proxy.spoil(Fault.DENIED, 10_000, {"PUT", "POST", "DELETE"})
    backend = open_backend(remote.url)
    assert backend.get("a/b") == b"data"
    assert backend.list_keys("") == ["a/b"]
    with pytest.raises(InputError, match=r"AccessDenied.*the right to list, read and write"):
        backend.probe_write_once()


def test_a_reader_may_pay_for_requests(remote: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """No server here charges anybody: what is checked is what we say."""
    open_backend(remote.url).create_once("a", b"data")
    monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")
    with remote.proxy.log() as requests:
        assert open_backend(remote.url).get("a") == b"data"
    assert {request.headers.get("x-amz-request-payer") for request in requests} == {"requester"}


def test_a_reader_of_a_public_object_may_be_anonymous(remote: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert remote.service is not None
    backend = open_backend(remote.url)
    for key in ("public", "private"):
        backend.create_once(key, b"data")
    prefix = remote.url.partition(remote.bucket)[2].strip("/")
    remote.service.client().put_object_acl(Bucket=remote.bucket, Key=f"{prefix}/public", ACL="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    with remote.proxy.log() as requests:
        anonymous = open_backend(remote.url)
        assert anonymous.get("public") == b"data"
        with pytest.raises(InputError, match="403"):
            anonymous.get("private")
    assert not [request for request in requests if "authorization" in request.headers]


def test_a_bucket_that_is_not_there(remote: Place) -> None:
    url = remote.url.replace(remote.bucket, "nobody-made-this-one")
    for act in (
        lambda: open_backend(url).probe_write_once(),
        lambda: open_backend(url).get_or_none("a"),
        lambda: open_backend(url).get_part("a", 0, 1),
        lambda: open_backend(url).get_part("a", -1),
        lambda: open_backend(url).list_keys(""),
    ):
        with pytest.raises(InputError, match="there is no such bucket; create it first"):
            act()


def test_no_service_at_the_endpoint(remote: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(RetryableError, match=r"reading a failed for 1 s \(.*127\.0\.0\.1:9") as caught:
        remote_backend(remote, IMPATIENT).get_or_none("a")
    assert "\n" not in str(caught.value)


def test_without_credentials(remote: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises((InputError, RetryableError), match="credentials") as caught:
        remote_backend(remote, IMPATIENT).get_or_none("a")
    assert "\n" not in str(caught.value)


def test_the_fsspec_client_is_loaded_only_where_it_is_asked_for() -> None:
    code = "import sys; from persona_ray.store.address import open_backend; open_backend('/tmp'); print('s3fs' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"


@pytest.mark.parametrize("url", ["fsspec+file:///tmp/x", "fsspec+memory://x", "fsspec+gs://b/x", "fsspec+http://host/x"])
def test_fsspec_is_refused_where_it_cannot_create_once(url: str) -> None:
    with pytest.raises(InputError, match=r"fsspec client serves s3: alone"):
        open_backend(url)


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/x", "fsspec+s3://key@bucket", "gs://user:secret@bucket/x"])
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InputError, match="must not hold credentials") as caught:
        open_backend(url)
    assert "secret" not in str(caught.value)
    assert "key@" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("fsspec+s3://", "names no bucket"),
        ("s3:///x", "names no bucket"),
        ("s3://b/x?versionId=1", "ends with its folder"),
        ("s3://b/x#y", "ends"),
    ],
)
def test_wrong_urls(url: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        open_backend(url)
