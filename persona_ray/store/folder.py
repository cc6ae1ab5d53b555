"""A store in a folder of a file system with hard links.

A new object is written to a temporary file, flushed to disk, and hard-linked to its name: the link fails if the name is
taken, so the first writer wins, and no reader ever sees half an object. obstore's own file backend does not flush.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from zarr.storage import LocalStore

from persona_ray.errors import InputError, RetryableError
from persona_ray.store.backend import Backend, ListedObject, StoredObject, recorded

TEMPORARY_FOLDER = "_tmp"
PASSING_FAULTS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT}
)
MAX_FOLDER_ATTEMPTS = 100
NO_HARD_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EXDEV})


class FolderBackend(Backend):
    """Objects are files below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    @recorded("create")
    def create_once(self, key: str, data: bytes) -> StoredObject:  # noqa: D102
        target = self.root / key
        with self._errors_in_words(key), self._temporary_file(data) as temporary:
            _make_folder(target.parent)
            is_new = _link(temporary, target)
            # Also for a loser: the winner may have died between its link and its flush, and a marker will name this file.
            _flush_folder(target.parent)
            return StoredObject.of(data if is_new else target.read_bytes(), data)

    @recorded("read")
    def get_or_none(self, key: str) -> bytes | None:  # noqa: D102
        with self._errors_in_words(key):
            try:
                return (self.root / key).read_bytes()
            except FileNotFoundError:
                return None

    @recorded("read")
    def part_or_none(self, key: str, start: int, stop: int | None = None) -> bytes | None:  # noqa: D102
        with self._errors_in_words(key):
            try:
                with (self.root / key).open("rb") as file:
                    first, end, _ = slice(start, stop).indices(os.fstat(file.fileno()).st_size)
                    file.seek(first)
                    return file.read(max(0, end - first))
            except FileNotFoundError:
                return None

    @recorded("list")
    def list_keys(self, folder: str) -> list[str]:  # noqa: D102
        with self._errors_in_words(folder):
            files = (path for path in (self.root / folder).rglob("*") if path.is_file())
            keys = (path.relative_to(self.root).as_posix() for path in files)
            return sorted(key for key in keys if not key.startswith(f"{TEMPORARY_FOLDER}/"))

    def list_objects(self, folder: str) -> list[ListedObject]:  # noqa: D102
        with self._errors_in_words(folder):
            return [found for key in self.list_keys(folder) if (found := self._listed(key)) is not None]

    def list_temporary(self) -> list[ListedObject]:  # noqa: D102
        with self._errors_in_words(TEMPORARY_FOLDER):
            names = sorted(path.name for path in (self.root / TEMPORARY_FOLDER).glob("*"))
            return [found for name in names if (found := self._listed(f"{TEMPORARY_FOLDER}/{name}")) is not None]

    def delete(self, key: str) -> None:  # noqa: D102
        target = self.root / key
        with self._errors_in_words(key):
            try:
                target.unlink()
            except FileNotFoundError:
                return
            _flush_folder(target.parent)

    @recorded("list")
    def list_folders(self, folder: str) -> list[str]:  # noqa: D102
        place = self.root / folder
        with self._errors_in_words(folder):
            if not place.is_dir():
                return []
            return sorted(path.relative_to(self.root).as_posix() for path in place.iterdir() if path.is_dir())

    def first_foreign_key(self) -> str | None:  # noqa: D102
        with self._errors_in_words("the folder"):
            if not self.root.exists():
                return None
            names = sorted(path.name for path in self.root.iterdir() if path.name != TEMPORARY_FOLDER)
            # A folder is no object: somebody may be about to put the first one into it.
            return next((name for name in names if _holds_a_file(self.root / name)), None)

    def zarr_store(self) -> LocalStore:  # noqa: D102
        return LocalStore(self.root, read_only=True)

    def probe_write_once(self) -> None:
        """Hard-link one file twice, and leave no trace. Raises InputError if that is not possible here."""
        missing = [folder for folder in (self.root / TEMPORARY_FOLDER, self.root, *self.root.parents) if not folder.exists()]
        with self._errors_in_words("write probe"):
            with self._temporary_file(b"probe") as temporary:
                probe = temporary.with_suffix(".probe")
                try:
                    is_refused = _link(temporary, probe) and not _link(temporary, probe)
                finally:
                    probe.unlink(missing_ok=True)
            if not is_refused:
                raise InputError(f"{self.url}: a file name can be taken twice here; put the store on another file system")
            for folder in missing:
                _remove_if_empty(folder)

    def _listed(self, key: str) -> ListedObject | None:
        """None if it has just gone."""
        try:
            facts = (self.root / key).stat()
        except FileNotFoundError:
            return None
        return ListedObject(key, facts.st_size, facts.st_mtime)

    def _replace(self, key: str, data: bytes) -> None:
        target = self.root / key
        with self._errors_in_words(key), self._temporary_file(data) as temporary:
            _make_folder(target.parent)
            temporary.replace(target)
            _flush_folder(target.parent)

    @contextmanager
    def _temporary_file(self, data: bytes) -> Iterator[Path]:
        """A flushed file with `data` on the same file system; gone afterwards."""
        path = self.root / TEMPORARY_FOLDER / uuid.uuid4().hex
        try:
            with _open_new(path) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield path
        finally:
            path.unlink(missing_ok=True)

    @contextmanager
    def _errors_in_words(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno in PASSING_FAULTS:
                raise RetryableError(f"{self.url}: {what}: {reason}") from error
            raise InputError(
                f"{self.url}: no usable folder for a store ({what}: {reason}); give one that can be read and written"
            ) from error


def _holds_a_file(path: Path) -> bool:
    """Whether it is one, or one is somewhere below."""
    return not path.is_dir() or any(not inner.is_dir() for inner in path.rglob("*"))


def _link(source: Path, target: Path) -> bool:
    """Give `source` a second name; False if the name is taken."""
    try:
        target.hardlink_to(source)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno in NO_HARD_LINKS:
            raise InputError(
                f"{target}: a store needs hard links, which this file system lacks; use another, or an object store"
            ) from error
        raise
    return True


def _open_new(path: Path) -> BinaryIO:
    """`path` for writing. Somebody else's probe may take the empty folder away before the file is in it."""
    for _ in range(MAX_FOLDER_ATTEMPTS):
        with suppress(FileNotFoundError):
            _make_folder(path.parent)
            return path.open("xb")
    _make_folder(path.parent)
    return path.open("xb")


def _make_folder(folder: Path) -> None:
    """Like mkdir -p, and each new name survives a power loss."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    try:
        folder.mkdir()
        _flush_folder(folder.parent)
    except FileExistsError:
        if folder.exists() and not folder.is_dir():
            raise


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_if_empty(folder: Path) -> None:
    """Another writer may be using it already; then it stays."""
    try:
        folder.rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
