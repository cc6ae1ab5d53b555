"""How many units are encoded or decoded at the same time in one process."""

from __future__ import annotations

import os
from threading import BoundedSemaphore

CODING = BoundedSemaphore(max(1, (os.cpu_count() or 1) // 2))
"""Held while a unit's numbers are encoded or decoded. More units than that are under way, since most of the time each waits for the
network; were they all coded at once, they would take each other's memory, and the first would be ready no sooner than the last.
Half of the cores are for the client, and for whoever makes or uses the numbers.
"""
