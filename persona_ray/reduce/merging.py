"""Statistics of many units, merged from those of each, in one process: the same tree of merges whoever computes its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, Self, TypeVar

from persona_ray.errors import NothingUsableError
from persona_ray.spec import ProgressCallback, RowSource, ScoredRows


class Mergeable(Protocol):
    """What is known of some rows. Merging is associative and commutative up to rounding."""

    def merge(self, other: Self) -> Self:
        """What is known of the rows of both."""
        ...


M = TypeVar("M", bound=Mergeable)


def merge_all(parts: Iterable[M]) -> M:
    """All parts merged pairwise as a tree, which keeps rounding small and at most log2(parts) + 2 results alive.

    The tree depends on the number of parts alone: a part of 2^k first parts is a node of it. So parts that were merged
    beforehand in aligned runs of a power of two give the same bits. Raises NothingUsableError if there is no part.
    """
    nodes: list[tuple[int, M]] = []
    for part in parts:
        size, node = 1, part
        while nodes and nodes[-1][0] == size:
            size, node = 2 * size, nodes.pop()[1].merge(node)
        nodes.append((size, node))
    if not nodes:
        raise NothingUsableError("there is nothing to reduce: not one unit is committed")
    merged = nodes.pop()[1]
    while nodes:
        merged = nodes.pop()[1].merge(merged)
    return merged


def fold_all(parts: Iterable[M]) -> M:
    """All parts merged one after the other into the first: for statistics that lose less when they grow than when small ones meet.

    Raises NothingUsableError if there is no part.
    """
    merged: M | None = None
    for part in parts:
        merged = part if merged is None else merged.merge(part)
    if merged is None:
        raise NothingUsableError("there is nothing to reduce: not one unit is committed")
    return merged


def in_process(
    source: RowSource,
    units: Sequence[int],
    measure: Callable[[ScoredRows], M],
    progress: ProgressCallback = lambda _: None,
    gather: Callable[[Iterable[M]], M] = merge_all,
) -> M:
    """`measure` of each of `units`, one after the other in this process, and merged by `gather`. `progress` is told of units.

    Raises NothingUsableError without units, and what `measure` and `source` raise.
    """
    return gather(_each_unit(source, units, measure, progress))


def _each_unit(source: RowSource, units: Sequence[int], measure: Callable[[ScoredRows], M], progress: ProgressCallback) -> Iterator[M]:
    for rows in source(units):
        yield measure(rows)
        progress(1)
