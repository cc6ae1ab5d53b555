"""Logs for machines: one JSON object a line, with what the message is about as keys of its own. Of a run's driver, and of its actors."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from persona_ray.errors import InputError

KEYS = ("run", "replica", "stage", "rank", "unit", "units", "lease", "kind")
"""What a record may be about."""
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_at_work: ContextVar[Mapping[str, Any]] = ContextVar("at_work", default=_NOTHING)
"""What this thread works on."""


@contextmanager
def at_work(**about: Any) -> Iterator[None]:
    """Whatever this thread logs while the `with` block lasts is about that; keys are some of `KEYS`."""
    before = _at_work.set(MappingProxyType({**_at_work.get(), **about}))
    try:
        yield
    finally:
        _at_work.reset(before)


class JsonLines(logging.Formatter):
    """`time` (ISO 8601, UTC), `level`, `logger`, `message`, and of `KEYS` those of process, thread (`at_work`) and record (`extra`)."""

    def __init__(self, run: str, **about: Any) -> None:
        """`about`: what the whole process is about."""
        super().__init__()
        self._run, self._about = run, about

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        of_record = {key: getattr(record, key) for key in KEYS if hasattr(record, key)}
        facts = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "run": self._run,
            "logger": record.name,
            "message": record.getMessage(),
        }
        return json.dumps({**facts, **self._about, **_at_work.get(), **of_record})


def log_to(path: Path, run: str) -> None:
    """From now on every record of this package, details included, is appended to the file. Raises InputError if it cannot be written."""
    try:
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--log {path}: cannot be written ({error})") from error
    handler.setFormatter(JsonLines(run))
    handler.setLevel(logging.DEBUG)
    ours = logging.getLogger("persona_ray")
    for other in logging.getLogger().handlers:
        other.setLevel(logging.INFO)  # people go on seeing what they saw
    ours.setLevel(logging.DEBUG)
    ours.addHandler(handler)


def log_to_stderr(run: str, **about: Any) -> None:
    """From now on this process, an actor, writes such lines to stderr, which Ray keeps in a file for each process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(run, **about))
    ours = logging.getLogger("persona_ray")
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)
    ours.propagate = False  # else whatever is set up above it prints the same once more
