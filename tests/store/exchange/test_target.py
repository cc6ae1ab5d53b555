"""An export is there whole, or it is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from persona_ray.errors import InputError
from persona_ray.store.exchange.target import files_in, new_folder


def test_what_was_written_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep/er/export"
    with new_folder(target) as draft:
        (draft / "part").mkdir()
        (draft / "part/file").write_text("x")
        assert not target.exists()
        assert "incomplete" in draft.name
    assert files_in(target) == ("part/file",)
    assert [path.name for path in target.parent.iterdir()] == ["export"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    with new_folder(tmp_path / "export") as draft:
        (draft / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    with new_folder(str(tmp_path / "empty")) as draft:
        (draft / "file").write_text("x")
    assert files_in(tmp_path / "empty") == ("file",)


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "export") as draft:
            (draft / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("place", "complaint"),
    [("full", "not empty"), ("full/file", "not empty"), ("full/file/deeper", "is a file"), ("s3://bucket/place", "folder of this machine")],
)
def test_other_places_are_refused(tmp_path: Path, place: str, complaint: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    with pytest.raises(InputError, match=complaint), new_folder(place if "://" in place else tmp_path / place):
        pass
    assert (tmp_path / "full/file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
