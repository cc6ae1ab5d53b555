"""What one reading of some rows gives: their tally, and the state of their components. Either may not be wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from persona_ray.reduce.incremental import IncrementalPCA
from persona_ray.reduce.tally import Tally
from persona_ray.spec import ScoredRows


@dataclass(frozen=True, slots=True)
class Measured:
    """Mergeable with what was measured likewise."""

    tally: Tally
    """Of nothing, if it was not wanted."""
    pca: IncrementalPCA | None
    """None: not wanted."""

    @classmethod
    def of(cls, rows: ScoredRows, *, with_tally: bool, rank: int | None) -> Self:
        """Of one unit; `rank` None: no components. Raises IntegrityError for a padding row, NaN or Inf among the rows."""
        tally = Tally.of(rows) if with_tally else Tally.nothing()
        return cls(tally, None if rank is None else IncrementalPCA.of(rows.activations_RLD, rank))

    def merge(self, other: Self) -> Self:
        """Of the rows of both."""
        pca = None if self.pca is None or other.pca is None else self.pca.merge(other.pca)
        return type(self)(self.tally.merge(other.tally), pca)
