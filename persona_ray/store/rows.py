"""Rows that were picked from a store, and their numbers in the shape that a tool wants. Nothing is read until it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from persona_ray.errors import InputError, IntegrityError
from persona_ray.spec import Float32, Rollout, ScoredRows
from persona_ray.store.layout import archetype_flags, layer_aliases

if TYPE_CHECKING:
    import torch
    import xarray

Rows64 = npt.NDArray[np.int64]
Wanted = str | int | Sequence[str] | Sequence[int]


class Source(Protocol):
    """What rows need of the store they are in."""

    url: str

    @property
    def archetypes(self) -> tuple[str, ...]:
        """Names by code."""
        ...

    def activations(self, rows_N: Rows64, layers: Sequence[int]) -> Float32:
        """(N, L, D)."""
        ...

    def scores(self, name: str | None, rows_N: Rows64) -> npt.NDArray[np.int8]:
        """(N,)."""
        ...

    def latest_scores(self) -> str | None:
        """Name of the judge in force."""
        ...

    def rollouts(self, units: Sequence[int]) -> Iterator[tuple[Rollout, ...]]:
        """The units' text."""
        ...

    def scored_rows(self, units: Sequence[int], scores: str | None, layers: Sequence[int] | None = None) -> Iterator[ScoredRows]:
        """Unit by unit."""
        ...

    @property
    def plans(self) -> Any:
        """`store.plans.Plans`."""
        ...


class Rows:
    """Committed, stored rows, rising. N of them; picking gives new ones and reads at most a column of scores."""

    def __init__(self, store: Source, layers: tuple[int, ...], rollout_N: Rows64, columns: dict[str, npt.NDArray[np.generic]]) -> None:
        self._store = store
        self.layers = layers
        """Those that all of the rows have, and that are read if none are named."""
        self.rollout_N = rollout_N
        """(N,) int64: rows of the store."""
        self.columns = columns
        """(N,) int32 each: `archetype` (a code), `system_prompt`, `question`, `sample`, `turn`."""

    def __len__(self) -> int:
        """How many."""
        return len(self.rollout_N)

    def __repr__(self) -> str:
        """In short."""
        return f"<{len(self):,} rows x {len(self.layers)} layers of {self._store.url}>"

    @property
    def archetype_names(self) -> list[str]:
        """One for each row."""
        return [self._store.archetypes[code] for code in self.columns["archetype"].tolist()]

    def scores(self, judge: str | None = None) -> npt.NDArray[np.int8]:
        """(N,) scores 0..3 by `judge` (None: the one in force); -1 where there is none."""
        return self._store.scores(judge or self._store.latest_scores(), self.rollout_N)

    # ---- picking

    def where(
        self,
        *,
        archetype: Wanted | None = None,
        system_prompt: int | Sequence[int] | None = None,
        question: int | Sequence[int] | None = None,
        sample: int | Sequence[int] | None = None,
        turn: int | Sequence[int] | None = None,
        score: int | Sequence[int] | None = None,
    ) -> Rows:
        """Those that have one of the values asked for in every column that is named; archetypes by name.

        Raises InputError for an archetype that the store does not know, and for `score` where no judge has spoken.
        """
        codes = None if archetype is None else [self._code(name) for name in _listed(archetype)]
        wanted = {"archetype": codes, "system_prompt": system_prompt, "question": question, "sample": sample, "turn": turn}
        is_picked_N = np.ones(len(self), dtype=bool)
        for name, values in wanted.items():
            if values is not None:
                is_picked_N &= np.isin(self.columns[name], _listed(values))
        picked = self.pick(np.flatnonzero(is_picked_N))
        if score is None:
            return picked
        if self._store.latest_scores() is None:
            raise InputError(f"{self._store.url}: no judge has scored these rows, so none can be picked by score")
        return picked.pick(np.flatnonzero(np.isin(picked.scores(), _listed(score))))

    def pick(self, places: npt.ArrayLike) -> Rows:
        """Those at `places` (0 is the first), or where a mask of N bools is true; in rising order, each once.

        Raises InputError for a place that is not there.
        """
        places_M = self._places(np.asarray(places))
        return Rows(self._store, self.layers, self.rollout_N[places_M], {name: values[places_M] for name, values in self.columns.items()})

    # ---- reading

    def layer(self, layer: int) -> Float32:
        """(N, D) float32: one decoder block's output."""
        return self.activations([layer])[:, 0]

    def activations(self, layers: Sequence[int] | None = None) -> Float32:
        """(N, L, D) float32; `layers` None: all that these rows have. Reads only what it needs."""
        return self._store.activations(self.rollout_N, self.layers if layers is None else layers)

    def stream(self, layers: Sequence[int] | None = None) -> Iterator[ScoredRows]:
        """Unit by unit in one pass, the next ones read ahead: for what does not fit into memory at once.

        Raises IntegrityError at the end if rows do not have the layers, or have gone since they were picked.
        """
        wanted = self.layers if layers is None else tuple(layers)
        num_seen = 0
        for rows in self._store.scored_rows(self._units(), self._store.latest_scores(), wanted):
            is_picked_R = np.isin(rows.rollout_R, self.rollout_N)
            num_seen += int(is_picked_R.sum())
            yield ScoredRows(
                rollout_R=rows.rollout_R[is_picked_R],
                archetype_R=rows.archetype_R[is_picked_R],
                score_R=rows.score_R[is_picked_R],
                activations_RLD=rows.activations_RLD[is_picked_R],
            )
        if num_seen != len(self):
            lack = f"{len(self) - num_seen} of {len(self)} picked rows have no activations of layers {list(wanted)}"
            raise IntegrityError(f"{self._store.url}: {lack}; pick rows that have them, and again if units were requeued since")

    def rollouts(self) -> Iterator[Rollout]:
        """Their texts and token ids, in order."""
        wanted = frozenset(self.rollout_N.tolist())
        for texts in self._store.rollouts(self._units()):
            yield from (text for text in texts if text.index in wanted)

    def to_torch(self, layers: Sequence[int] | None = None) -> torch.Tensor:
        """(N, L, D) float32 on the CPU. Raises InputError without PyTorch."""
        try:
            import torch  # noqa: PLC0415
        except ModuleNotFoundError as error:
            raise InputError("torch is not installed; pip install 'persona-ray[engine]', or take numpy from activations()") from error
        return torch.from_numpy(self.activations(layers))

    def to_xarray(self, layers: Sequence[int] | None = None) -> xarray.Dataset:
        """`activations` (rollout, layer, hidden) with coordinates that say what a row is. Raises InputError without xarray."""
        try:
            import xarray  # noqa: PLC0415
        except ModuleNotFoundError as error:
            raise InputError("xarray is not installed; pip install 'persona-ray[readers]', or take numpy from activations()") from error
        wanted = self.layers if layers is None else tuple(layers)
        flags = {"archetype": archetype_flags(self._store.archetypes)}
        columns = {name: ("rollout", values, flags.get(name, {})) for name, values in self.columns.items()}
        return xarray.Dataset(
            {"activations": (("rollout", "layer", "hidden"), self.activations(wanted)), "score": ("rollout", self.scores())},
            coords={"rollout": self.rollout_N, "layer": ("layer", list(wanted), layer_aliases()), **columns},
            attrs={"store": self._store.url},
        )

    def _places(self, wanted: npt.NDArray[Any]) -> Rows64:
        if wanted.dtype == np.bool_ and wanted.shape == (len(self),):
            return np.flatnonzero(wanted)
        if wanted.dtype.kind in "iu" or not wanted.size:
            places_M = np.unique(wanted).astype(np.int64)
            if not places_M.size or 0 <= places_M[0] <= places_M[-1] < len(self):
                return places_M
        raise InputError(f"{self._store.url}: places are whole numbers from 0 to {len(self) - 1}, or a mask of {len(self)} bools")

    def _units(self) -> list[int]:
        return sorted({self._store.plans.unit_of(row) for row in self.rollout_N.tolist()})

    def _code(self, name: str | int) -> int:
        if name not in self._store.archetypes:
            more = ", ..." if len(self._store.archetypes) > 8 else ""
            raise InputError(f"{self._store.url}: no archetype {name!r}; there are {', '.join(self._store.archetypes[:8])}{more}")
        return self._store.archetypes.index(str(name))


def _listed(values: Wanted) -> list[Any]:
    return [values] if isinstance(values, str | int | np.integer) else list(values)
