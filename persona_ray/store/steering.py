"""The steering check of a result, as a JSON note beside it: `reduced/{name}/steering.json`."""

from __future__ import annotations

from dataclasses import asdict

from pydantic import TypeAdapter, ValidationError

from persona_ray.errors import IntegrityError
from persona_ray.spec import SteeringCheck
from persona_ray.store.reduced import read_note, write_note

NOTE = "steering"
_CHECK = TypeAdapter(SteeringCheck)


def write_steering(url: str, name: str, check: SteeringCheck) -> None:
    """Keep the check beside result `name`; one that is there already is left as it is."""
    write_note(url, name, NOTE, asdict(check))


def read_steering(url: str, name: str) -> SteeringCheck | None:
    """The check of result `name`, or None if none was made. Raises IntegrityError if it is damaged."""
    note = read_note(url, name, NOTE)
    if note is None:
        return None
    try:
        return _CHECK.validate_python(note)
    except ValidationError as error:
        first = error.errors()[0]
        raise IntegrityError(f"{url}: the steering check of {name} is damaged at {first['loc']}: {first['msg']}") from error
