"""A run while it goes on: looked at again and again, drawn in place on a terminal, a line for each change without one.

Knows a run's driver by a function that answers for it, and its rows by the store; each can be missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from persona_ray.errors import InputError, RetryableError
from persona_ray.report.progress import store_progress
from persona_ray.report.words import count, duration
from persona_ray.store.prepare import stored_job
from persona_ray.store.reader import StoreReader, open_store

Facts = Mapping[str, Any]

SILENCE_S = 60.0
"""So long a head may be silent before watching it is given up."""
ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
BAR_CHARS = 30


class Watched:
    """A run, a store, or a run with its store."""

    def __init__(self, ask: Callable[[], Facts] | None = None, store_url: str | None = None) -> None:
        """`ask`: what the cluster knows of the run, with its `store`; None: there is only the store at `store_url`."""
        self._ask, self._url = ask, store_url
        self._store: StoreReader | None = None
        self._run: dict[str, Any] | None = None
        self._heard_s = time.monotonic()

    def look(self) -> dict[str, Any]:
        """Plain JSON values: `run` and `store` (None: not asked for, or not there), `problem`, `is_over`, `has_failed`.

        Raises InputError if the store is all there is and it is not there, RetryableError if the cluster stays silent.
        """
        run = self._look_at_run()
        store, problem = self._look_at_store()
        state = None if run is None else run["state"]
        return {
            "run": run,
            "store": store,
            "problem": problem,
            "is_over": bool(store and store["is_complete"]) if state is None else state in ENDED,
            "has_failed": state in {"FAILED", "STOPPED"},
        }

    def _look_at_run(self) -> dict[str, Any] | None:
        if self._ask is None:
            return None
        try:
            self._run = dict(self._ask())
        except RetryableError as error:
            if self._run is None or time.monotonic() - self._heard_s > SILENCE_S:
                raise
            return self._run | {"state": "SILENT", "message": str(error)}
        self._heard_s = time.monotonic()
        self._url = self._run["store"]
        return self._run

    def _look_at_store(self) -> tuple[dict[str, Any] | None, str | None]:
        """Its progress, or why there is none. With a run to look at, a store that cannot be read is no reason to stop."""
        if self._url is None:
            return None, "not submitted by persona-ray, so its store is not known"
        try:
            if self._store is None and self._ask is not None and stored_job(self._url) is None:
                return None, "the store is not begun yet"
            self._store = self._store or open_store(self._url)
            return store_progress(self._store, time.time()), None
        except (InputError, RetryableError) as error:
            if self._ask is None:
                raise
            return None, str(error)


def watch(watched: Watched, console: Console, interval_s: float) -> dict[str, Any]:
    """Look until it is over, and show every look; answers the last one."""
    if console.is_terminal and not console.quiet:
        return _draw(watched, console, interval_s)
    said = ""
    for facts in _looks(watched, interval_s):
        line = status_line(facts)
        if line != said:
            console.print(f"{datetime.now(UTC):%H:%M:%S} {line}", markup=False, highlight=False, soft_wrap=True)
        said = line
    return facts


def _draw(watched: Watched, console: Console, interval_s: float) -> dict[str, Any]:
    with Live(console=console, auto_refresh=False) as live:
        for facts in _looks(watched, interval_s):
            live.update(status_table(facts), refresh=True)
    return facts


def _looks(watched: Watched, interval_s: float) -> Iterator[dict[str, Any]]:
    """At least one."""
    while True:
        facts = watched.look()
        yield facts
        if facts["is_over"]:
            return
        time.sleep(interval_s)


# ---- in words


def status_line(facts: Facts) -> str:
    """One line, made of what is known."""
    return ", ".join(part for part in (_state(facts["run"]), *_short(facts["store"]), facts["problem"]) if part)


def status_table(facts: Facts) -> Table:
    """Two columns."""
    table = Table.grid(Column(), Column(overflow="fold"), padding=(0, 2))
    for name, value in (*_run_lines(facts["run"]), *_store_lines(facts["store"])):
        table.add_row(name, Text(value))
    if facts["problem"]:
        table.add_row("store", Text(facts["problem"]))
    return table


def _state(run: Facts | None) -> str:
    return "" if run is None else run["state"].lower() + (f" ({run['message']})" if run["message"] else "")


def _short(store: Facts | None) -> Iterator[str]:
    if store is None:
        return
    rows, rates = store["rows"], store["rates"]
    yield f"{rows['stored'] + rows['refused']:,} of {count(rows['asked'], 'row')}, {rows['refused']:,} refused"
    for part in store["more_layers"]:
        yield f"{len(part['layers'])} more layers in {part['committed']:,} of {count(store['units']['planned'], 'unit')}"
    if rates is not None and not store["is_complete"]:
        yield f"{rates['rows_per_s']:,.3g} rows/s, {rates['tokens_per_s']:,.0f} tokens/s"
    if store["seconds_left"]:
        yield f"{duration(store['seconds_left'])} left"
    if store["money"] is not None and not store["is_complete"]:
        yield f"money {store['money']['spent']:,.2f}, {store['money']['left']:,.2f} left"
    if store["peak_device_bytes"] is not None and not store["is_complete"]:
        yield f"GPU memory {store['peak_device_bytes'] / 1e9:.1f} GB"
    if store["axis_so_far"] is not None and store["axis"] is None:
        yield f"axis so far: {_so_far(store['axis_so_far'])}"
    if store["is_complete"]:
        yield f"axis {store['axis'] or 'not computed yet'}"


def _run_lines(run: Facts | None) -> Iterator[tuple[str, str]]:
    if run is None:
        return
    yield "run", run["name"]
    yield "state", _state(run)
    if run["submitted"]:
        yield "submitted", run["submitted"]
    if run["ended"]:
        yield "ended", run["ended"]


def _store_lines(store: Facts | None) -> Iterator[tuple[str, str]]:
    if store is None:
        return
    rows, units = store["rows"], store["units"]
    done = rows["stored"] + rows["refused"]
    yield "store", store["url"]
    yield "rows", f"{_bar(done, rows['asked'])} {done:,} of {rows['asked']:,}: {rows['stored']:,} stored, {rows['refused']:,} refused"
    for reason, number in rows["reasons"].items():
        yield "", f"{number:,} x {reason}"
    yield "units", f"{units['committed']:,} of {units['planned']:,} committed"
    for part in store["more_layers"]:
        yield "more layers", f"{len(part['layers'])} in {part['committed']:,} of {units['planned']:,} units"
    yield from _speed_lines(store)
    yield "last commit", store["last_commit"] or "none yet"
    if store["seconds_left"]:
        yield "time left", f"about {duration(store['seconds_left'])}"
    if store["money"] is not None:
        money = store["money"]
        price = f"at {money['per_gpu_hour']:g} an hour of a GPU, {money['source']}"
        yield "money", f"about {money['spent']:,.2f} spent and {money['left']:,.2f} left ({price}; loading and waiting not counted)"
    if store["axis_so_far"] is not None:
        yield "axis so far", _so_far(store["axis_so_far"])
    yield "axis", store["axis"] or "none yet"


def _so_far(look: Facts) -> str:
    """The worst of the layers that were looked at."""
    layer, cosine = min(zip(look["layers"], look["expected_cosine"], strict=True), key=lambda pair: pair[1])
    return f"expected cosine {cosine:.4f} with that of endlessly many rows, after {look['rows_per_archetype']:,} of each (layer {layer})"


def _speed_lines(store: Facts) -> Iterator[tuple[str, str]]:
    rates = store["rates"]
    if rates is not None:
        over = f"over the {duration(rates['over_s'])} before the last commit"
        yield "speed", f"{rates['rows_per_s']:,.3g} rows/s, {rates['tokens_per_s']:,.0f} tokens/s, {over}"
        yield "replicas", f"about {rates['busy_replicas']:.1f} busy in that time"
    for name, units in store["hardware"].items():
        yield "hardware", f"{name} ({count(units, 'unit')})"
    if store["peak_device_bytes"] is not None:
        yield "GPU memory", f"{store['peak_device_bytes'] / 1e9:.1f} GB at most, on the fullest GPU"


def _bar(done: int, total: int) -> str:
    full = BAR_CHARS * done // max(total, 1)
    return "[" + "#" * full + "." * (BAR_CHARS - full) + "]"
