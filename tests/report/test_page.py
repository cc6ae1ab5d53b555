from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from persona_ray.report.data import ReportData
from persona_ray.report.page import inert_json, payload, render_page
from persona_ray.spec import Reduced

MakeReduced = Callable[..., Reduced]

EVIL = [
    "</script><script>window.hacked = 1</script>",
    '"quoted" & <b>bold</b>',
    "<img src=x onerror=window.hacked=1>",
    "$policy ${data}",
    "<!--",
]


class Parsed(HTMLParser):
    """Elements and texts as a browser would see them, near enough."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data
        elif self.cdata_elem is None:
            self.text += data


def own_part(page: str) -> str:
    """The page without Plotly, which names URLs in code that is never reached."""
    return page.replace(get_plotlyjs(), "")


def test_nothing_is_loaded_from_elsewhere(report: ReportData) -> None:
    page = own_part(render_page(report))
    for tag, attributes in Parsed(page).elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert not re.match(r"(https?:)?//", attributes.get(name) or ""), (tag, attributes)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket|sendBeacon|import\(", page)


def test_policy_allows_the_two_scripts_and_nothing_else(report: ReportData) -> None:
    page = Parsed(render_page(report))
    policy = next(str(attributes["content"]) for tag, attributes in page.elements if tag == "meta" and "http-equiv" in attributes)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts[1:]]
    assert len(page.scripts) == 3
    assert re.findall(r"'sha256-([^']+)'", policy) == digests
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    assert "script-src 'unsafe-inline'" not in policy


@pytest.mark.parametrize("evil", EVIL)
def test_texts_of_the_data_are_inert(report: ReportData, make_reduced: MakeReduced, evil: str) -> None:
    assert report.steering is not None
    example = replace(report.steering.examples[0], archetype=evil, question=evil, answers={"none": evil, evil: evil})
    steering = replace(report.steering, examples=(example,), cohorts={"far": (evil,), evil: (evil,)})
    reduced = make_reduced(num_roles=3, names=[evil, "b", "c"], best_layer_reason=evil)
    run = {
        "title": evil,
        "model_id": evil,
        "store_url": evil,
        evil: evil,
        "rows": {"asked": 1, "stored": 0, "refused": 1, "reasons": {evil: 1}},
    }
    page = Parsed(own_part(render_page(ReportData(reduced=reduced, steering=steering, run=run))))
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "img" not in {tag for tag, _ in page.elements}
    assert page.text.count(evil) >= 8
    assert json.loads(page.scripts[0])["names"][0] == evil


@pytest.mark.parametrize("value", [*EVIL, {"</script>": ["<", ">", "&", "\u2028", "\u00e9"]}])
def test_inert_json_reads_back(value: object) -> None:
    text = inert_json(value)
    assert not set("<>&") & set(text)
    assert json.loads(text) == value


def test_payload_is_strict_json_of_what_is_drawn(report: ReportData) -> None:
    found = json.loads(json.dumps(payload(report), allow_nan=False))
    assert len(found["layers"]) == 4
    assert found["best"] == 2
    assert found["names"] == [f"role_{code}" for code in range(12)]
    assert found["layers"][0]["separation"] is None
    assert len(found["layers"][0]["x"]) == 12
    assert all(value == float(f"{value:.5g}") for value in found["layers"][1]["x"])


def test_unknown_numbers_do_not_break_the_page(report: ReportData) -> None:
    cosines_L = report.reduced.cos_pc1_axis_L.copy()
    cosines_L[:] = np.nan
    page = render_page(replace(report, reduced=replace(report.reduced, cos_pc1_axis_L=cosines_L), run={}))
    assert "NaN" not in own_part(page)


def test_page_of_a_large_model_stays_small(make_reduced: MakeReduced) -> None:
    data = ReportData(reduced=make_reduced(num_roles=275, num_layers=80, hidden=300), steering=None, run={})
    assert len(own_part(render_page(data))) < 1_500_000


def test_page_tells_what_was_run(report: ReportData) -> None:
    text = Parsed(own_part(render_page(report))).text
    for fact in (
        "tiny-persona",
        "5f" * 32,
        "ab" * 32,
        "/data/store",
        "1,560",
        "the answer is empty",
        "lexicon-12345678",
        "2.49.0",
        "green",
        "2.5\u00a0min",
    ):
        assert fact in text


def test_page_shows_steering_with_its_control(report: ReportData) -> None:
    text = Parsed(own_part(render_page(report))).text
    assert "the answer under -axis" in text
    assert "random direction × \u22122" in text
    assert "66\u00a0%" in text


@pytest.mark.parametrize(("part", "text"), [("steering", "No steering check was run"), ("judge", "No judge: every stored row counts")])
def test_page_says_what_was_not_done(without: Callable[[str], ReportData], part: str, text: str) -> None:
    assert text in Parsed(own_part(render_page(without(part)))).text
