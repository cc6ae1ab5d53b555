"""Selecting takes a part and never renumbers it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_ray.catalog.select import select
from persona_ray.config import CatalogConfig
from persona_ray.errors import InputError
from persona_ray.spec import Archetype, Catalog, Question


def catalog(questions: int = 7) -> Catalog:
    return Catalog(
        (
            Archetype("angel", "", ("a", "b", "c")),
            Archetype("plain", "", ("", "d"), is_default=True),
            Archetype("witch", "", ("e", "f", "g")),
        ),
        tuple(Question(f"question {i}?") for i in range(questions)),
    )


def test_all() -> None:
    selection = select(catalog(), CatalogConfig(system_prompts=2, questions=7, samples=3))

    assert [archetype.name for archetype in selection.archetypes] == ["angel", "plain", "witch"]
    assert selection.questions == tuple(range(7))
    assert (selection.system_prompts, selection.samples) == (2, 3)


def test_a_list_keeps_the_catalogues_order_and_always_has_the_default() -> None:
    names = [
        archetype.name for archetype in select(catalog(), CatalogConfig(archetypes=("witch",), system_prompts=1, questions=1)).archetypes
    ]
    assert names == ["plain", "witch"]


@given(total=st.integers(1, 300), share=st.floats(0, 1))
def test_questions_are_spread_evenly(total: int, share: float) -> None:
    wanted = max(1, round(share * total))
    chosen = select(catalog(total), CatalogConfig(system_prompts=1, questions=wanted)).questions

    assert len(chosen) == wanted
    assert chosen[0] == 0
    gaps = [after - before for before, after in zip(chosen, (*chosen[1:], total), strict=True)]
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1


def test_an_unknown_archetype_is_refused_with_the_closest_name() -> None:
    with pytest.raises(InputError, match="'wich' is not in the catalogue; did you mean witch"):
        select(catalog(), CatalogConfig(archetypes=("angel", "wich"), system_prompts=1, questions=1))
    with pytest.raises(InputError, match="'xylophone' is not in the catalogue; it has 3 others"):
        select(catalog(), CatalogConfig(archetypes=("xylophone",), system_prompts=1, questions=1))


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(InputError, match="plain has only 2 system prompts, the job asks for 3"):
        select(catalog(), CatalogConfig(system_prompts=3, questions=1))
    with pytest.raises(InputError, match="asks for 8 questions, the catalogue has 7"):
        select(catalog(), CatalogConfig(system_prompts=1, questions=8))
