"""Progress, as a log and as silence."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from persona_ray import terminal
from persona_ray.terminal import TerminalProgress


def test_without_a_terminal_there_are_plain_lines_with_rate_and_total(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "LINE_EVERY_S", 0.0)
    out = io.StringIO()
    with TerminalProgress(Console(file=out)).phase("capture", 10, "rows", done=4) as advance:
        advance(2)
        advance(4)
    first, second, last = out.getvalue().splitlines()
    assert first.startswith("capture: 6/10 rows, ")
    assert second.startswith("capture: 10/10 rows, ")
    assert last.startswith("capture: 10 rows in ")
    assert "\x1b" not in out.getvalue()


def test_lines_are_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    with TerminalProgress(Console(file=out)).phase("capture", 1000, "rows") as advance:
        for _ in range(1000):
            advance(1)
    assert len(out.getvalue().splitlines()) == 1


def test_a_terminal_gets_a_bar_that_ends_full() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with TerminalProgress(console).phase("capture", 0, "rows", done=1) as advance:
        advance(3)
    assert "4/4" in out.getvalue()


def test_machines_get_nothing() -> None:
    out = io.StringIO()
    with TerminalProgress(Console(file=out, quiet=True)).phase("capture", 10, "rows") as advance:
        advance(10)
    assert out.getvalue() == ""
