"""How sure a result is, as a JSON note beside it: `reduced/{name}/certainty.json`."""

from __future__ import annotations

from dataclasses import asdict

from pydantic import TypeAdapter, ValidationError

from persona_ray.errors import IntegrityError
from persona_ray.spec import Certainty
from persona_ray.store.reduced import read_note, write_note

NOTE = "certainty"
NONE = "none"
"""Key of the reason, in a note that says that there are none."""
_CERTAINTY = TypeAdapter(Certainty)


def write_certainty(url: str, name: str, certainty: Certainty) -> None:
    """Keep it beside result `name`; one that is there already is left as it is."""
    write_note(url, name, NOTE, asdict(certainty))


def write_no_certainty(url: str, name: str, reason: str) -> None:
    """Keep beside result `name` why nobody can tell how sure it is, so that it is not tried again."""
    write_note(url, name, NOTE, {NONE: reason})


def was_measured(url: str, name: str) -> bool:
    """Whether it is known how sure result `name` is, or why nobody can tell."""
    return read_note(url, name, NOTE) is not None


def read_certainty(url: str, name: str) -> Certainty | None:
    """That of result `name`, or None if there is none. Raises IntegrityError if it is damaged."""
    note = read_note(url, name, NOTE)
    if note is None or NONE in note:
        return None
    try:
        return _CERTAINTY.validate_python(note)
    except ValidationError as error:
        first = error.errors()[0]
        raise IntegrityError(f"{url}: the error bars of {name} are damaged at {first['loc']}: {first['msg']}") from error
