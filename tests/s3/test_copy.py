"""Copies between a folder and a real S3 protocol, through both clients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from persona_ray.errors import RetryableError
from persona_ray.store import copy_whole
from persona_ray.store.copy import copy_store
from persona_ray.store.diff import diff_stores
from persona_ray.store.finish import finish_store
from persona_ray.store.listing import list_stores
from persona_ray.store.marker import marker_key
from persona_ray.store.reader import open_store
from persona_ray.store.reduced import publish_reduced, write_reduced
from persona_ray.store.verify import verify
from tests.s3.conftest import Place
from tests.store.conftest import Toy
from tests.store.test_copy import score
from tests.store.test_reduced import a_result


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> str:
    url = Toy().fill(tmp_path / "source", refused={3: "too long"})
    score(url, "one", 0)
    write_reduced(url, a_result())
    publish_reduced(url, "r-1")
    open_store(url).cite()
    finish_store(url)
    return url


def test_to_a_service_and_back_is_the_same_byte_by_byte(remote: Place, source: str, tmp_path: Path) -> None:
    there = copy_store(source, remote.url)
    back = copy_store(remote.url, str(tmp_path / "back"))
    assert (there.units, there.flaws, back.units, back.flaws) == (3, (), 3, ())
    assert there.num_bytes == back.num_bytes
    assert files(tmp_path / "back") == files(Path(source))
    assert verify(remote.url).is_right
    assert diff_stores(open_store(source), open_store(remote.url)).is_equal
    (line,) = list_stores(remote.url.removesuffix("/runs/one"))
    assert (line.url, line.problem) == (remote.url, None)
    assert line.summary is not None
    assert (line.summary.rows, line.summary.committed) == (10, (3,))


def test_a_part_of_a_remote_store(remote: Place, source: str, tmp_path: Path) -> None:
    copy_store(source, remote.url)
    copied = copy_store(remote.url, str(tmp_path / "part"), layers=[3], archetypes=["bard"])
    assert (copied.rows, copied.is_right) == (3, True)
    found = diff_stores(open_store(str(tmp_path / "part")), open_store(source))
    assert (found.both, found.only_in_a, found.texts, found.token_ids) == (3, (), (), ())
    assert [(layer.layer, layer.rows - layer.bit_equal) for layer in found.layers] == [(3, 0)]


def test_cut_off_and_repeated(remote: Place, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_unit: Callable[..., Any] = copy_whole._Copier.copy_unit

    def cut_off(self: Any, unit: int) -> Any:
        if unit == 2:
            raise RetryableError("the line is dead")
        return copy_unit(self, unit)

    monkeypatch.setattr(copy_whole._Copier, "copy_unit", cut_off)
    with pytest.raises(RetryableError):
        copy_store(source, remote.url)
    assert not {2} & set(open_store(remote.url).units())
    monkeypatch.setattr(copy_whole._Copier, "copy_unit", copy_unit)
    again = copy_store(source, remote.url)
    assert again.is_right
    assert again.units + again.already_there == 3
    assert again.already_there == 2
    assert open_store(remote.url).snapshot().digest == open_store(source).snapshot().digest
    assert marker_key(2) in open_store(remote.url)._backend.list_keys("_commits")
