"""Stores against each other: opens their results one after the other, keeps what is compared of each, and goes through all pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

from persona_ray.errors import InputError
from persona_ray.reduce.space_pair import Space, SpacePair, compare_spaces
from persona_ray.spec import Reduced
from persona_ray.store.reader import StoreReader
from persona_ray.store.reference import open_result

NUM_COMPONENTS = 3
"""Principal components that are compared, unless another number is asked for; the paper looks at three (App. B.3, C.3)."""


def compare_results(references: Sequence[str], num_components: int = NUM_COMPONENTS) -> tuple[SpacePair, ...]:
    """Every pair of the results that `references` name (STORE or STORE@NAME), in order.

    Raises InputError for fewer than two, the same one twice, one that is not there, and a pair of which nothing can be compared.
    """
    twice = [reference for reference, times in Counter(references).items() if times > 1]
    if len(references) < 2 or twice:
        what = f"{twice[0]} is named twice" if twice else f"{len(references)} named"
        raise InputError(f"{what}: expected two stores or more, each once; STORE@NAME takes another result of a store")
    spaces = [open_space(reference, num_components) for reference in references]
    return tuple(compare_spaces(a, b) for a, b in combinations(spaces, 2))


def compare_with(store: StoreReader, others: Sequence[str], num_components: int = NUM_COMPONENTS) -> tuple[SpacePair, ...]:
    """The result in force of `store` against each of the others. Raises InputError as `compare_results`."""
    name = store.latest_reduced()
    if not others or name is None:
        return ()
    space = _space(store.url, store, store.reduced(name), num_components)
    return tuple(compare_spaces(space, open_space(other, num_components)) for other in others)


def open_space(reference: str, num_components: int = NUM_COMPONENTS) -> Space:
    """What is compared of a result. Raises InputError if it is not there."""
    return _space(reference, *open_result(reference), num_components)


def _space(label: str, store: StoreReader, reduced: Reduced, num_components: int) -> Space:
    return Space.of(
        reduced,
        label=label,
        model_id=str(store.identity["model_id"]),
        num_blocks=store.layers[-1] + 1,
        is_depth_known=store.job.get("capture", {}).get("layers") == "all",
        num_components=num_components,
    )
