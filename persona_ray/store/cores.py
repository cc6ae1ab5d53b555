"""How many units are encoded or decoded at the same time in one process.

More units than that are under way, since most of the time each waits for the network. Were they all coded at once, they would take
each other's memory, and the first would be ready no sooner than the last. Measured on two cores beside a server: encoding is fastest
with half of the cores, which leaves the others to the client; decoding with all of them.
"""

from __future__ import annotations

import os
from threading import BoundedSemaphore

_CORES = os.cpu_count() or 1
ENCODING = BoundedSemaphore(max(1, _CORES // 2))
"""Held while a unit's numbers are encoded."""
DECODING = BoundedSemaphore(_CORES)
"""Held while a unit's numbers are decoded."""
