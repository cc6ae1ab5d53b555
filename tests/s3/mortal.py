"""Writers that die suddenly, each a fork of one process: a new interpreter for each would take longer than its work.

    python -m tests.s3.mortal steps URL UNIT_ROWS ROWS NUM_STEPS      one death in each unit: every step, every moment
    python -m tests.s3.mortal random URL UNIT_ROWS ROWS SEED DEATHS   three at once, until so many have died; then to the end

The parent never opens a store, so no fork inherits a thread or a connection.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn

from persona_ray.store.cloud import CloudBackend
from persona_ray.store.filesystem import FilesystemBackend
from persona_ray.store.folder import FolderBackend
from persona_ray.store.ledger import Ledger
from persona_ray.store.remote import RemoteBackend
from persona_ray.store.writer import UnitWriter
from tests.s3.writer import write_unit, write_units
from tests.store.conftest import Toy

NUM_AT_ONCE = 3
MAX_LIFE_CREATES = 12
MAX_LINGER_S = 0.02


class Moment(StrEnum):
    """When, around the creation of one object."""

    BEFORE = "before"
    UNDERWAY = "underway"
    """The bytes are on their way (half of them, or in a temporary file); the name is not there."""
    ARRIVED = "arrived"
    """The name is there, and the writer does not know yet: it waits for the reply."""
    AFTER = "after"


MOMENTS = tuple(Moment)


def death_of(unit: int) -> tuple[int, Moment]:
    """Which object of its unit, counted from 0, and when, is the last thing in the life of the unit's writer."""
    return unit // len(MOMENTS), MOMENTS[unit % len(MOMENTS)]


def dying_seed(unit: int) -> int:
    """The seed of that writer."""
    return 10 + unit


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def around(owner: Any, name: str, happen: Callable[[Callable[[], Any]], Any]) -> None:
    """From now on `happen` is asked to do what the method did."""
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(lambda *args, **kwargs: happen(lambda: original(*args, **kwargs))))


@dataclass
class Doom:
    """This process dies at the `step`-th creation."""

    step: int
    moment: Moment
    count: int = -1

    def arm(self) -> None:
        for backend in (RemoteBackend, FolderBackend):
            around(backend, "create_once", self.create)
        for client in (CloudBackend, FilesystemBackend):
            around(client, "_put", self.put)
        around(Path, "hardlink_to", self.link)

    def create(self, act: Callable[[], Any]) -> Any:
        self.count += 1
        self.die_at(Moment.BEFORE)
        done = act()
        self.die_at(Moment.AFTER)
        return done

    def put(self, act: Callable[[], Any]) -> Any:
        """A service's proxy spoils this one: the exception is the last that the writer hears."""
        try:
            return act()
        except (*CloudBackend.faults, *FilesystemBackend.faults):
            self.die_at(Moment.UNDERWAY)
            self.die_at(Moment.ARRIVED)
            raise

    def link(self, act: Callable[[], Any]) -> Any:
        self.die_at(Moment.UNDERWAY)
        done = act()
        self.die_at(Moment.ARRIVED)
        return done

    def die_at(self, moment: Moment) -> None:
        if (self.count, moment) == (self.step, self.moment):
            die()


def arm_at_random(dice: random.Random) -> None:
    """This process dies within some time of some creation."""
    left = dice.randint(0, MAX_LIFE_CREATES)
    linger_s = dice.uniform(0, MAX_LINGER_S)

    def create(act: Callable[[], Any]) -> Any:
        nonlocal left
        if left == 0:
            threading.Timer(linger_s, die).start()
        left -= 1
        return act()

    for backend in (RemoteBackend, FolderBackend):
        around(backend, "create_once", create)


def fork(life: Callable[[], None]) -> int:
    """The id of a new process that does this and ends with 0, or says why not and ends with 1."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        life()
        status = 0
    finally:
        if status:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)


def was_killed(status: int) -> bool:
    """By the signal; any other end but that of work done is an error."""
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def die_at_every_step(url: str, toy: Toy, num_steps: int) -> None:
    """Unit by unit."""

    def live(unit: int) -> None:
        Doom(*death_of(unit)).arm()
        write_unit(UnitWriter(url), toy, unit, dying_seed(unit))

    for unit in range(num_steps * len(MOMENTS)):
        assert was_killed(os.waitpid(fork(functools.partial(live, unit)), 0)[1]), f"unit {unit}: outlived {death_of(unit)}"


def die_at_random(url: str, toy: Toy, seed: int, num_deaths: int) -> None:
    """Says how many died. A writer that finds all units committed lives; then nobody is sent after it."""
    dice = random.Random(seed)

    def live(writer: int, draw: random.Random | None) -> None:
        if draw is not None:
            arm_at_random(draw)
        write_units(url, toy, writer, set(toy.plan.units) - Ledger(url).committed())

    dead, sent, at_work = 0, 0, 0
    while sent < num_deaths + NUM_AT_ONCE or at_work:
        while at_work < NUM_AT_ONCE and sent < num_deaths + NUM_AT_ONCE:
            sent, at_work = sent + 1, at_work + 1
            fork(functools.partial(live, sent, random.Random(dice.random()) if sent <= num_deaths else None))
        dead += was_killed(os.wait()[1])
        at_work -= 1
    print(dead)


if __name__ == "__main__":
    what, url, unit_rows, rows, *numbers = sys.argv[1:]
    toy = Toy(rows=int(rows), unit_rows=int(unit_rows))
    {"steps": die_at_every_step, "random": die_at_random}[what](url, toy, *map(int, numbers))
