"""Logs for machines: one JSON object a line, with what the message is about as keys of its own."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from pathlib import Path

from persona_ray.errors import InputError

KEYS = ("run", "replica", "unit", "units", "lease", "kind")
"""What a record may be about."""


class JsonLines(logging.Formatter):
    """`time` (ISO 8601, UTC), `level`, `logger`, `message`, and those of `KEYS` that were given as `extra`."""

    def __init__(self, run: str) -> None:
        super().__init__()
        self._run = run

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        about = {key: getattr(record, key) for key in KEYS if hasattr(record, key)}
        facts = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "run": self._run,
            "logger": record.name,
            "message": record.getMessage(),
        }
        return json.dumps(facts | about)


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
