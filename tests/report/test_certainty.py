"""Error bars in words and as a card of the page."""

from __future__ import annotations

from dataclasses import replace

import pytest

from persona_ray.report.certainty import section, sentences
from persona_ray.spec import CertainPosition, Certainty

CERTAINTY = Certainty(
    layer=22,
    confidence=0.9,
    num_replicates=199,
    num_questions=240,
    cone_degrees=2.5,
    split_half_cosine=0.9987,
    rows_per_archetype=(1, 20),
    cosine_with_all_rows=(None, 0.995),
    rows_needed=20,
    default=CertainPosition(10.0, 9.0, 11.0),
    roles={"bard": CertainPosition(-3.0, -3.5, -2.5, 2, 2), "<sage>": CertainPosition(4.0, 3.0, 5.0, 1, 2)},
)


def test_sentences_say_what_was_measured() -> None:
    cone, halves, enough = sentences(CERTAINTY)
    for part in ("layer 22", "2.5", "199", "240 questions"):
        assert part in cone
    assert "1.00" in halves or "0.999" in halves
    assert enough.startswith("The first 20 rows of every archetype")
    assert "more rows may still move it" in sentences(replace(CERTAINTY, rows_needed=None))[2]


def test_the_card_has_every_role_in_order_with_its_ranks_and_escapes_names() -> None:
    card = section(CERTAINTY)
    assert card.index("default Assistant") < card.index("&lt;sage&gt;") < card.index("bard")
    assert "<td>1 to 2</td>" in card
    assert "<td>2</td></tr>" in card
    assert "<sage>" not in card
    assert "<td>none</td>" in card


@pytest.mark.parametrize("words", ["No error bars", "reduce.bootstrap"])
def test_without_error_bars_the_card_says_why(words: str) -> None:
    assert words in section(None)
