"""Waiting for what an actor answers: lost processes and our own errors come out as themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from persona_ray.errors import LostError, PersonaRayError, RetryableError


def answer(future: object) -> Any:
    """`ray.get`, with a lost process or object as LostError, and our own errors as themselves."""
    try:
        return ray.get(future)  # type: ignore[call-overload]
    except (RayActorError, ObjectLostError) as error:
        raise LostError(f"a shard was lost: {str(error).strip().splitlines()[0]}") from error
    except RayTaskError as error:
        if isinstance(error.cause, PersonaRayError):
            raise error.cause from error
        if isinstance(error.cause, (RayActorError, ObjectLostError)):  # an earlier stage was lost while this one waited for its output
            raise LostError(f"a shard was lost: {str(error.cause).strip().splitlines()[0]}") from error
        raise


def answers(futures: Sequence[Any], grace_s: float) -> list[Any]:
    """All answers, or the first failure as soon as it comes, and at the latest `grace_s` after it.

    Ranks that compute together wait for each other: when one fails, the others may never answer. Raises what failed first; as
    RetryableError if any of the others is still silent after the grace.
    """
    waiting = list(futures)
    while waiting:
        finished, waiting = ray.wait(waiting, num_returns=1)
        try:
            answer(finished[0])
        except Exception as error:
            _, silent = ray.wait(waiting, num_returns=len(waiting), timeout=grace_s) if waiting else ([], [])
            if silent:
                raise RetryableError(f"{len(silent)} ranks wait for one that failed: {error}") from error
            raise
    return [answer(future) for future in futures]
