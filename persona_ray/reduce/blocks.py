"""Layers in blocks, so that the statistics of one block fit into memory however many layers there are."""

from __future__ import annotations

from collections.abc import Sequence

BLOCK_BYTES = 640_000_000
"""Of the moments of a block, in every process that holds them; two or three of them are alive while results are merged."""
NUM_GROUPS = 276 * 4
"""Of which moments are kept, at the paper's size: archetypes x scores. A fixed number, so that blocks do not depend on the rows."""
BYTES_PER_DIM = 16
"""Mean and sum of squares, float64."""


def layer_blocks(layers: Sequence[int], hidden_size: int) -> tuple[tuple[int, ...], ...]:
    """`layers` in order, cut into consecutive blocks; the cut follows from their number and the hidden size alone."""
    size = max(1, BLOCK_BYTES // (NUM_GROUPS * BYTES_PER_DIM * hidden_size))
    return tuple(tuple(layers[start : start + size]) for start in range(0, len(layers), size))
