from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_ray.errors import InputError, IntegrityError, RetryableError, StateError
from persona_ray.store.address import absolute_url, open_backend
from persona_ray.store.backend import StoredObject
from persona_ray.store.folder import FolderBackend


def test_the_first_writer_wins(tmp_path: Path) -> None:
    backend = open_backend(str(tmp_path))
    first = backend.create_once("a/b", b"one")
    second = backend.create_once("a/b", b"other")
    assert first == StoredObject(3, hashlib.sha256(b"one").hexdigest(), is_ours=True)
    assert second == StoredObject(3, hashlib.sha256(b"one").hexdigest(), is_ours=False)
    assert backend.create_once("a/b", b"one").is_ours
    assert (tmp_path / "a/b").read_bytes() == b"one"


def test_an_object_is_on_disk_before_it_has_its_name_and_the_name_before_we_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[tuple[str, bool]] = []

    def record(descriptor: int) -> None:
        place = Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(tmp_path)
        flushed.append((place.parts[0] if place.parts else ".", (tmp_path / "a/b").exists()))

    backend = open_backend(str(tmp_path))
    backend.create_once("other", b"")
    monkeypatch.setattr(os, "fsync", record)
    backend.create_once("a/b", b"data")
    assert flushed == [("_tmp", False), (".", False), ("a", True)]


def test_of_many_writers_at_once_exactly_one_wins(tmp_path: Path) -> None:
    backend = open_backend(str(tmp_path))
    barrier = threading.Barrier(8)
    answers: list[StoredObject] = []

    def write(number: int) -> None:
        barrier.wait()
        answers.append(backend.create_once("deep/down/key", bytes([number]) * 5000))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.is_ours for answer in answers].count(True) == 1
    assert {answer.sha256 for answer in answers} == {hashlib.sha256(backend.get("deep/down/key")).hexdigest()}
    assert list((tmp_path / "_tmp").iterdir()) == []


def test_only_metadata_and_latest_may_be_replaced(tmp_path: Path) -> None:
    backend = open_backend(str(tmp_path))
    for key in ("zarr.json", "a/zarr.json", "scores/latest.json", "reduced/latest.json"):
        backend.replace(key, b"1")
        backend.replace(key, b"2")
        assert backend.get(key) == b"2"
    for key in ("status/c/0", "_commits/000000.json", "other/latest.json", "nozarr.json"):
        with pytest.raises(StateError, match="write-once"):
            backend.replace(key, b"1")


def test_listing(tmp_path: Path) -> None:
    backend = open_backend(str(tmp_path))
    for key in ("b/2", "a", "b/1", "b/c/3", "bb/4"):
        backend.create_once(key, b"")
    assert backend.list_keys("") == ["a", "b/1", "b/2", "b/c/3", "bb/4"]
    assert backend.list_keys("b") == ["b/1", "b/2", "b/c/3"]
    assert backend.list_keys("absent") == []
    assert [name for name in backend.list_folders("") if name != "_tmp"] == ["b", "bb"]
    assert backend.list_folders("b") == ["b/c"]
    assert backend.list_folders("absent") == []
    assert backend.get_many(["b/1", "a"]) == [b"", b""]


def test_a_missing_object_is_none_or_an_error_in_words(tmp_path: Path) -> None:
    backend = open_backend(str(tmp_path))
    assert backend.get_or_none("a/b") is None
    with pytest.raises(IntegrityError, match="a/b is missing"):
        backend.get("a/b")


@given(data=st.binary(max_size=9), start=st.integers(-12, 12), stop=st.none() | st.integers(0, 12))
def test_a_part_of_an_object_is_a_slice_of_its_bytes(data: bytes, start: int, stop: int | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        backend = open_backend(folder)
        backend.create_once("a/b", data)
        stop = stop if start >= 0 else None
        assert backend.get_part("a/b", start, stop) == backend.part_or_none("a/b", start, stop) == data[start:stop]


def test_a_part_of_a_missing_object_is_none_or_an_error_in_words(tmp_path: Path) -> None:
    backend = open_backend(str(tmp_path))
    assert backend.part_or_none("a/b", 1, 2) is None
    assert backend.part_or_none("a/b", -2) is None
    with pytest.raises(IntegrityError, match="a/b is missing"):
        backend.get_part("a/b", -2)
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="no usable folder for a store"):
        backend.get_part("a", 0, 2)


def test_the_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    open_backend(str(tmp_path / "new" / "deep")).probe_write_once()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "keep").mkdir()
    open_backend(str(tmp_path / "keep")).probe_write_once()
    assert list((tmp_path / "keep").iterdir()) == []


def test_the_probe_refuses_a_place_where_the_second_create_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless_link(self: Path, target: Path) -> None:
        self.write_bytes(Path(target).read_bytes())

    monkeypatch.setattr(Path, "hardlink_to", careless_link)
    with pytest.raises(InputError, match="taken twice"):
        open_backend(str(tmp_path)).probe_write_once()


class _CarelessCloud(FolderBackend):
    """Honours no condition, as some S3 look-alikes do; probed like a cloud."""

    def create_once(self, key: str, data: bytes) -> StoredObject:
        self._replace(key, data)
        return StoredObject.of(data, data)

    def probe_write_once(self) -> None:
        super(FolderBackend, self).probe_write_once()


def test_the_probe_refuses_a_service_that_ignores_conditions(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="If-None-Match"):
        _CarelessCloud(tmp_path).probe_write_once()


def test_the_cloud_probe_passes_again_and_again_where_conditions_hold(tmp_path: Path) -> None:
    class Careful(FolderBackend):
        def probe_write_once(self) -> None:
            super(FolderBackend, self).probe_write_once()

    for _ in range(3):
        Careful(tmp_path).probe_write_once()
    assert Careful(tmp_path).list_keys("") == ["_probe/write-once"]


@pytest.mark.parametrize(
    ("code", "expected", "words"),
    [("EOPNOTSUPP", InputError, "hard links"), ("EPERM", InputError, "hard links"), ("ENOSPC", RetryableError, "space")],
)
def test_what_a_failing_link_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, expected: type[Exception], words: str
) -> None:
    number = getattr(__import__("errno"), code)

    def failing_link(self: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "hardlink_to", failing_link)
    with pytest.raises(expected, match=words):
        open_backend(str(tmp_path)).create_once("key", b"data")
    assert not (tmp_path / "key").exists()


def test_a_place_that_cannot_be_used_is_an_input_error_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for url in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/persona-ray-store")):
        backend = open_backend(str(url))
        with pytest.raises(InputError) as caught:
            backend.probe_write_once()
        assert str(url) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("/a/b", "/a/b"),
        ("a b", "{cwd}/a b"),
        ("~/a", "{home}/a"),
        ("file:///a/b%20c", "/a/b c"),
        ("file:/a/b", "/a/b"),
        ("file:a", "{cwd}/a"),
        ("s3://bucket/a/", "s3://bucket/a"),
        ("gs://bucket", "gs://bucket"),
    ],
)
def test_addresses_mean_the_same_in_any_process(url: str, expected: str) -> None:
    wanted = expected.format(cwd=Path.cwd(), home=Path.home())
    assert absolute_url(url) == wanted
    assert absolute_url(absolute_url(url)) == wanted


@pytest.mark.parametrize("url", ["memory:x", "http://host/x", "ftp://x", "file://host/x", ""])
def test_addresses_that_are_not_served(url: str) -> None:
    with pytest.raises(InputError):
        open_backend(url)


def test_a_bad_cloud_address_is_an_input_error() -> None:
    with pytest.raises(InputError, match="s3://"):
        open_backend("s3://")
