"""Statistics on a Ray cluster: one task for each slice of units, results merged as a tree by further tasks.

The only file of this package that knows Ray. Rows are read where the tasks run; the driver receives the last merge alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayTaskError, WorkerCrashedError

from persona_ray.errors import NothingUsableError, PersonaRayError, RetryableError
from persona_ray.reduce import gpu
from persona_ray.reduce.merging import M, in_process, merge_all
from persona_ray.spec import ProgressCallback, RowSource, ScoredRows

if TYPE_CHECKING:
    from ray import ObjectRef

# Nodes come and go: a lost worker is ordinary, ten in a row for one slice are not.
_OPTIONS: dict[str, Any] = {"num_cpus": 1, "max_retries": 10, "retry_exceptions": [RetryableError]}


def on_cluster(
    source: RowSource,
    units: Sequence[int],
    measure: Callable[[ScoredRows], M],
    num_tasks: int,
    progress: ProgressCallback = lambda _: None,
    gather: Callable[[Iterable[M]], M] = merge_all,
    num_gpus: float = 0,
) -> M:
    """`measure` of `units`, merged, by at most `num_tasks` Ray tasks of one CPU and `num_gpus` each; bit-equal to `in_process`.

    `gather` puts the units of one task together, a tree those of tasks. Equal bits need `merge_all`, slices of a power of two
    units, so that every slice is a node of the serial merge tree, and one ScoredRows for each unit. `source`, `measure` and `gather`
    travel to the workers and must pickle. `progress` is told of units, slice by slice.
    Raises NothingUsableError without units, RetryableError if workers keep dying, and what `source` and `measure` raise.
    """
    if not units:
        raise NothingUsableError("there is nothing to reduce: not one unit is committed")
    size = slice_size(len(units), num_tasks)
    slices = [list(units[start : start + size]) for start in range(0, len(units), size)]
    task: Any = _on_gpu if num_gpus else in_process
    reduce_slice: Any = ray.remote(task).options(**_OPTIONS, num_gpus=num_gpus)
    source_ref, measure_ref = ray.put(source), ray.put(measure)
    parts = {reduce_slice.remote(source_ref, part, measure_ref, gather=gather): len(part) for part in slices}
    try:
        _report(parts, progress)
        merged: M = ray.get(_merged(list(parts)))
    except RayTaskError as error:
        if isinstance(error.cause, PersonaRayError):
            raise error.cause from error
        raise
    except (WorkerCrashedError, NodeDiedError, OutOfMemoryError, ObjectLostError) as error:
        cause = " ".join(str(error).split())
        raise RetryableError(f"a reducing worker was lost again and again ({cause}); is there enough memory for its slice?") from error
    return merged


def _on_gpu(source: RowSource, units: Sequence[int], measure: Callable[[ScoredRows], M], *, gather: Callable[[Iterable[M]], M]) -> M:
    with gpu.given():
        return in_process(source, units, measure, gather=gather)


def free_gpus() -> int:
    """Whole GPUs that nothing on the cluster has reserved."""
    return int(ray.available_resources().get("GPU", 0))  # type: ignore[no-untyped-call]


def slice_size(num_units: int, num_tasks: int) -> int:
    """The smallest power of two with which at most `num_tasks` slices hold all units."""
    least = -(-num_units // max(1, num_tasks))
    return 1 << (least - 1).bit_length()


def _report(parts: dict[ObjectRef[Any], int], progress: ProgressCallback) -> None:
    waiting = list(parts)
    while waiting:
        done, waiting = ray.wait(waiting, fetch_local=False)
        for part in done:
            progress(parts[part])


def _merged(parts: list[ObjectRef[Any]]) -> ObjectRef[Any]:
    """The same tree as `merge_all`: the left branch is the largest power of two of parts."""
    if len(parts) == 1:
        return parts[0]
    left = 1 << ((len(parts) - 1).bit_length() - 1)
    merge: Any = ray.remote(_merge).options(**_OPTIONS)
    merged: ObjectRef[Any] = merge.remote(_merged(parts[:left]), _merged(parts[left:]))
    return merged


def _merge(left: M, right: M) -> M:
    return left.merge(right)
