"""What people see: bars on a terminal while a command works, plain lines without one, one JSON document where machines read."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from persona_ray.spec import ProgressCallback

LINE_EVERY_S = 10.0
"""Without a terminal: at most one line of progress in this time."""


class TerminalProgress:
    """Implements `spec.Progress` on a rich console."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def phase(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[ProgressCallback]:
        """One piece of long work; `total` 0 = not known before, `done` = there already, no part of the rate."""
        if self._console.quiet:
            yield lambda _: None
        elif self._console.is_terminal:
            with self._bar(name, total, unit, done) as advance:
                yield advance
        else:
            with self._lines(name, total, unit, done) as advance:
                yield advance

    @contextmanager
    def _bar(self, name: str, total: int, unit: str, done: int) -> Iterator[ProgressCallback]:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(f"{unit}, {{task.fields[rate]}}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        began = time.monotonic()
        num_new = 0
        with Progress(*columns, console=self._console) as bars:
            task = bars.add_task(name, total=total or None, completed=done, rate="")

            def advance(number: int) -> None:
                nonlocal num_new
                num_new += number
                bars.update(task, advance=number, rate=_rate(num_new, began))

            yield advance
            bars.update(task, total=done + num_new, completed=done + num_new)

    @contextmanager
    def _lines(self, name: str, total: int, unit: str, done: int) -> Iterator[ProgressCallback]:
        began = last = time.monotonic()
        num_new = 0

        def advance(number: int) -> None:
            nonlocal num_new, last
            num_new += number
            if time.monotonic() - last >= LINE_EVERY_S:
                last = time.monotonic()
                of_total = f"/{total}" if total else ""
                self._console.print(f"{name}: {done + num_new}{of_total} {unit}, {_rate(num_new, began)}")

        yield advance
        self._console.print(f"{name}: {done + num_new} {unit} in {time.monotonic() - began:.1f} s")


def _rate(num_done: int, began: float) -> str:
    seconds = time.monotonic() - began
    return f"{num_done / seconds:.1f}/s" if seconds > 0 else ""


def show(facts: dict[str, Any], *parts: Any, as_json: bool) -> None:
    """Print `facts` as JSON, or `parts` (text or anything that rich can draw) for people."""
    if as_json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    console = Console()
    for part in parts:
        if isinstance(part, str):  # paths stay whole, and square brackets are no markup
            print(part)
        else:
            console.print(part)
