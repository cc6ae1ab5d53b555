"""What a benchmark of a store is asked: every option with its default and its help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ENCODED_SHARE = 0.87
"""Encoded bytes of a row as a share of its bytes in bfloat16, about: turns megabytes of a unit into its rows."""

HELP: Mapping[str, str] = {
    "unit_mb": "encoded megabytes of a unit, about",
    "units": "units written or read in a turn",
    "threads": "units in flight, each with its own writer, and puts in flight of the bare client",
    "pairs": "turns of each",
    "layers": "captured layers",
    "hidden": "model width",
}
"""Option -> what it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is measured."""

    unit_mb: float = 8.0
    units: int = 8
    threads: int = 4
    pairs: int = 7
    layers: int = 36
    hidden: int = 2560

    @property
    def unit_rows(self) -> int:
        """Rows that encode to about `unit_mb`."""
        return max(1, round(self.unit_mb * 1e6 / (ENCODED_SHARE * 2 * self.layers * self.hidden)))

    @property
    def unit_float32_bytes(self) -> int:
        """Of a unit's activations in memory."""
        return 4 * self.unit_rows * self.layers * self.hidden

    @property
    def batches(self) -> int:
        """Of `units` each: one to begin with, one a pair, one that a process of its own writes."""
        return self.pairs + 2
