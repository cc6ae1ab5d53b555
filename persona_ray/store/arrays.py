"""Parts of arrays by Zarr, with the shapes that the plans give: the metadata that a service holds may be behind them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import WrapperStore

from persona_ray.store.backend import METADATA_NAME
from persona_ray.store.encoding import array_document
from persona_ray.store.layout import ArraySpec

READ_CONCURRENCY = 32
"""A layer is one small read per unit: at zarr's default of 10 most of the time is waiting."""


def read_rows(store: Store, spec: ArraySpec, rows_N: npt.NDArray[np.int64], *rest: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """The rows (rising) of an array in its own dtype, whole in all other dims but for the places that `rest` picks from the next ones.

    Only the chunks that hold them are read; one that is not there gives the fill value.
    """
    array = zarr.open_array(_Planned(store, spec), path=spec.name, mode="r", zarr_format=3)
    with zarr.config.set({"async.concurrency": READ_CONCURRENCY}):
        return np.asarray(array.oindex[(rows_N, *rest)])


class _Planned(WrapperStore[Store]):
    """A store in which one array's metadata are those of its plan."""

    def __init__(self, store: Store, spec: ArraySpec) -> None:
        super().__init__(store)
        self._spec = spec
        self._documents: Mapping[str, bytes] = {f"{spec.name}/{METADATA_NAME}": array_document(spec)}

    def _with_store(self, store: Store) -> _Planned:
        return type(self)(store, self._spec)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The object, or a part of it; None if there is none."""
        if key in self._documents:
            return default_buffer_prototype().buffer.from_bytes(self._documents[key])
        return await super().get(key, prototype, byte_range)
