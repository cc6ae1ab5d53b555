"""Other persona spaces on the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from persona_ray.reduce.space_pair import Space, SpacePair, compare_spaces
from persona_ray.report.compare import comparison_json
from persona_ray.report.compare_card import section
from persona_ray.report.data import ReportData
from persona_ray.report.page import payload, render_page
from persona_ray.spec import Reduced

MakeReduced = Callable[..., Reduced]
MakePair = Callable[..., SpacePair]
AsSpace = Callable[..., Space]


class Texts(HTMLParser):
    """What a reader sees, and which elements make it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags = "", set[str]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_what_is_drawn_are_the_places_of_the_archetypes_that_both_have(make_reduced: MakeReduced, make_pair: MakePair) -> None:
    names = ["stranger", *(f"role_{number}" for number in range(11))]
    pair = make_pair(names=names)
    [drawn] = payload(ReportData(reduced=make_reduced(), steering=None, run={}, comparisons=(pair,)))["comparisons"]
    assert drawn["names"] == [f"role_{number}" for number in range(11)]
    place = pair.a.best_place
    np.testing.assert_allclose(drawn["x"], pair.a.position_AL[:11, place], rtol=1e-4)
    np.testing.assert_allclose(drawn["y"], pair.b.position_AL[1:, place], rtol=1e-4)
    assert (drawn["xTitle"], drawn["yTitle"]) == ("model of a, layer 2", "model of b, layer 2")


def test_the_card_says_the_numbers_the_notes_and_who_is_left_out(make_pair: MakePair) -> None:
    pair = make_pair(names=["stranger", *(f"role_{number}" for number in range(11))])
    found = Texts(section((pair,)))
    assert f"{pair.at_best.position_pearson:.4f}" in found.text
    assert "hidden sizes are 16 and 20" in found.text
    assert "role_11, stranger" in found.text
    assert section(()) == ""


@pytest.mark.parametrize("evil", ["</script><script>window.hacked = 1</script>", "<img src=x onerror=window.hacked=1>", '"&<!--'])
def test_texts_of_other_stores_are_inert(make_reduced: MakeReduced, make_pair: MakePair, evil: str) -> None:
    pair = make_pair(evil)
    page = render_page(ReportData(reduced=make_reduced(), steering=None, run={}, comparisons=(pair,)))
    assert evil not in page
    card = Texts(section((pair,)))
    assert card.text.count(evil) >= 2
    assert not card.tags & {"img", "script"}


def test_unknown_numbers_are_null_and_unknown(make_reduced: MakeReduced, as_space: AsSpace) -> None:
    """A layer whose axis is 0, and one place for all archetypes."""
    reduced = make_reduced()
    flat = as_space(replace(reduced, axis_LD=np.zeros_like(reduced.axis_LD)), "flat")
    pair = compare_spaces(as_space(reduced, "a"), flat)
    document = json.loads(json.dumps(comparison_json((pair,)), allow_nan=False))["pairs"][0]
    assert document["at_best"]["axis_cosine"] is None
    assert document["at_best"]["position_pearson"] is None
    assert document["at_best"]["loading_pearson"] == pytest.approx([1, 1, 1])
    assert "unknown" in Texts(section((pair,))).text
    json.dumps(payload(ReportData(reduced=reduced, steering=None, run={}, comparisons=(pair,))), allow_nan=False)
