"""Where an export goes: a folder that is new or empty, and that is there only once it is finished."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from persona_ray.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What an export wrote."""

    folder: str
    files: tuple[str, ...]
    """Paths relative to `folder`, sorted."""
    rows: int
    """Of the store that are in the export; of a result: that it was made from."""
    left_out: Mapping[str, int]
    """Why -> number of committed rows that are not in it."""
    ledger_digest: str
    """State of the store that was exported."""


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary sibling of `folder` to write into, which takes its place at the end, or goes away if there was an error.

    A killed export leaves `.{name}.incomplete-...` behind, and nothing under the name. Raises InputError if `folder` is not new or empty.
    """
    target = _checked(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.incomplete-{uuid.uuid4().hex[:8]}")
    draft.mkdir()
    try:
        yield draft
        draft.replace(target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def files_in(folder: Path) -> tuple[str, ...]:
    """All files at any depth, relative to `folder`, sorted."""
    return tuple(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()))


def _checked(folder: str | Path) -> Path:
    if isinstance(folder, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", folder):
        raise InputError(f"{folder}: an export is written into a folder of this machine; give a path, and copy what comes out")
    target = Path(folder).expanduser().absolute()
    if target.is_dir() and not any(target.iterdir()):
        return target
    if target.exists():
        raise InputError(f"{target}: is there already and not empty; an export wants a new or empty folder")
    blocked = next((place for place in target.parents if place.exists() and not place.is_dir()), None)
    if blocked is not None:
        raise InputError(f"{target}: cannot be created, {blocked} is a file")
    return target
