"""The error tree, grouped by what the caller would do.

    PersonaRayError
    ├── InputError        the user can mend it: job file, catalogue, URL, command line   -> exit 2, nothing was begun
    ├── RetryableError    the same call may well succeed later: actor lost, store throttled
    │   ├── OutOfMemoryError  a batch did not fit on its device: half of it may
    │   └── LostError         a process went down, perhaps over what it was doing
    ├── IntegrityError    the data are not what they must be: shape, NaN, digest, a layer that was never hooked
    ├── StateError        our own mistake: a transition that must not happen
    └── NothingUsableError  the run ended without one usable row                         -> exit 1

Every error survives pickling (Ray sends them between processes): one message, no further constructor arguments.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_INPUT = 2
EXIT_INTERRUPTED = 130


class PersonaRayError(Exception):
    """Base of all errors that persona_ray raises on purpose. The message says what, where, and what would be right."""

    exit_code = EXIT_FAILED


class InputError(PersonaRayError, ValueError):
    """Something the user gave cannot be used; nothing was begun."""

    exit_code = EXIT_INPUT


class RetryableError(PersonaRayError):
    """A passing fault: doing the same thing again may succeed."""


class OutOfMemoryError(RetryableError):
    """A batch did not fit into a device's memory; nothing of it was lost."""


class LostError(RetryableError):
    """A process is gone, with all it was doing, which may be why."""


class IntegrityError(PersonaRayError):
    """Numbers or bytes are wrong in a way that another attempt will not mend."""


class StateError(PersonaRayError, RuntimeError):
    """A state machine was asked for an impossible step: a defect of persona_ray itself."""


class NothingUsableError(PersonaRayError):
    """The work ended, and no row of it can be used."""
