from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from persona_ray.report.data import ReportData
from persona_ray.report.words import cautions, decimal, duration, findings, names, percent
from persona_ray.spec import SteeringCheck


def said(texts: list[str]) -> str:
    return " ".join(texts).replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0 %"), (0.083, "8.3 %"), (0.0996, "10 %"), (0.344, "34 %"), (1.0, "100 %"), (float("nan"), "unknown")]
)
def test_percent(share: float, text: str) -> None:
    assert percent(share).replace("\u00a0", " ") == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.714, "0.71"), (-1.5, "\u22121.50"), (123.4, "123"), (None, "unknown"), (float("nan"), "unknown")]
)
def test_decimal(value: float | None, text: str) -> None:
    assert decimal(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(3.94, "3.9 s"), (600, "10.0 min"), (36000, "10.0 h")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds).replace("\u00a0", " ") == text


def test_long_lists_of_names_are_cut() -> None:
    assert names(tuple("abc")) == "a, b, c"
    assert names(tuple(str(number) for number in range(15))).endswith("10, 11 and 3 more")


def test_findings_give_axis_and_steering(report: ReportData) -> None:
    text = said(findings(report))
    assert "At layer 2, the first principal component explains" in text
    assert "12 role vectors" in text
    assert "Adding 2 × the axis at layer 2 raises" in text
    assert "8.0 % before, 66 % after" in text


def test_an_axis_that_works_backwards_is_said_to_lower(report: ReportData, steering: SteeringCheck) -> None:
    arms = tuple(replace(arm, assistant_share=0.01) if arm.label == "+axis" else arm for arm in steering.arms)
    assert "lowers the share" in said(findings(replace(report, steering=replace(steering, arms=arms))))


def test_what_was_not_done_is_said(without: Callable[[str], ReportData]) -> None:
    assert "No steering check was run" in said(cautions(without("steering")))
    assert "Adding" not in said(findings(without("steering")))
    assert "No judge: every stored row counts" in said(cautions(without("judge")))


def test_a_whole_run_needs_no_caution(report: ReportData) -> None:
    assert cautions(replace(report, run={"rows": {"asked": 10, "stored": 10, "refused": 0}})) == []


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ({"asked": 1560, "stored": 1552, "refused": 8}, "8 rows of 1,560 were refused"),
        ({"asked": 10, "stored": 9, "refused": 1}, "1 row of 10 was refused"),
        ({"asked": 100, "stored": 60, "refused": 0}, "not complete: 40 rows of 100 are still missing"),
    ],
)
def test_refused_and_missing_rows_are_said(report: ReportData, rows: dict[str, Any], text: str) -> None:
    assert text in said(cautions(replace(report, run={"rows": rows})))


def test_archetypes_without_a_role_vector_are_named(report: ReportData) -> None:
    roles_ALD = report.reduced.role_vector_ALD.copy()
    roles_ALD[[1, 3]] = np.nan
    found = said(cautions(replace(report, reduced=replace(report.reduced, role_vector_ALD=roles_ALD))))
    assert "having fewer than 10 usable rows: role_1, role_3." in found
